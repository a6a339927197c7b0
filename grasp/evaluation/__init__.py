"""The quality of a model: perplexity, tasks, generation."""
