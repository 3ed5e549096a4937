"""A network of the user's own, given as a function: `jd.distill` trains any method on it."""
