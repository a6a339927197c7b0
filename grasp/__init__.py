"""GRASP: make a causal language model smaller by replacing redundant layers with low-rank ones."""
