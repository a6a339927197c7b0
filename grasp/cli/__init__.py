"""The command line. Nothing heavy is imported before a command needs it: ``grasp --help`` answers at once."""

# The order of these imports is that of the commands in `grasp --help`.
from grasp.cli import compress, recover, evaluate, inspect, report, push, env, bench, bench_costs, gate, demo  # noqa: F401, I001
from grasp.cli.root import app, main

__all__ = ["app", "main"]
