"""Compressed checkpoints in serving stacks that load models in ways of their own."""
