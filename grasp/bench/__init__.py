"""Benchmarks of speed: ops, whole models, compressions. Results are checked before they are timed."""
