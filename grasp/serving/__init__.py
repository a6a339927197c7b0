"""Compressed checkpoints in serving stacks that do not load models with transformers."""
