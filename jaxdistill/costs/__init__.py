"""Counts of compiled programs, and the chips they run on: FLOPs, bytes, collectives, peaks.

Planning and MFU.
"""
