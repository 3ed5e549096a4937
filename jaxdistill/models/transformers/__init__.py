"""Diffusion transformers as diffusers has them: SD 3 and 3.5, PixArt, FLUX.1, Z-Image.

A parameter's path is its name in a checkpoint.
"""
