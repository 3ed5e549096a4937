"""Distil a diffusion model into a student that needs one to three network calls, in JAX."""

__version__ = "0.1.0"
