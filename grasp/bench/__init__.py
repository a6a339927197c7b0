"""Measurements of speed: every op, a whole model, a compression; each proves its results before it times them."""
