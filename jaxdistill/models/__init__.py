"""Flax Linen networks. They import nothing from the rest of the package."""
