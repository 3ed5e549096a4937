"""Networks that judge images: Inception, CLIP's image tower, and the classifiers trained here."""
