"""The steps of a compression: targets, candidates, budget, refit."""
