"""The command line. Heavy imports wait until a command needs them, so that ``grasp --help`` is fast."""

# The order of these imports is the order of the commands in `grasp --help`.
from grasp.cli import (  # noqa: F401, I001
    compress,
    recover,
    convert,
    quantize,
    evaluate,
    inspect,
    report,
    push,
    env,
    bench,
    bench_costs,
    bench_record,
    bench_serve,
    demo,
)
from grasp.cli.root import app, main

__all__ = ["app", "main"]
