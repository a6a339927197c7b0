"""Measures models: perplexity, tasks of lm-eval, generation speed."""
