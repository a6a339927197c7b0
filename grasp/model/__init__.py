"""A transformers model: find its linears, run a part of it, replace them."""
