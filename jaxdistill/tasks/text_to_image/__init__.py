"""Stable Diffusion 1.x, 2.x and XL: a pipeline folder and prompts in, a student's folder out."""
