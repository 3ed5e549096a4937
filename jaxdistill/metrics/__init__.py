"""Distances between sets of images and of features, and the networks that read images for them."""
