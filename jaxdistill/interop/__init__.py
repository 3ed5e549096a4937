"""Formats of other projects, in and out."""
