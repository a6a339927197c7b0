"""The disk: checkpoints, reports, and the run folder of an unfinished run."""
