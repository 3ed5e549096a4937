"""Captions to 32x32 pictures of two garments: text to image with composition on two CPU cores."""
