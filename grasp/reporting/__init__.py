"""Pages and figures about a checkpoint and its benchmarks."""
