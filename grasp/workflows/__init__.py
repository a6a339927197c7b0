"""From a model name and a text to a folder or a number."""
