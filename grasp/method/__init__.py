"""Matrices and numbers: decompositions, ranks, budgets. Nothing here knows transformers."""
