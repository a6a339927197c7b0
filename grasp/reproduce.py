"""The command that makes a compression again, from what its report has. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grasp.report import CompressionReport

# What a report calls it → what ``grasp compress`` calls it.
_CONFIG = {
    "layers": "--layers",
    "num_layers": "--num-layers",
    "compression_ratio": "--compression-ratio",
    "retain_ratio": "--retain-ratio",
    "threshold_ratio": "--threshold-ratio",
    "basis": "--basis",
    "metric": "--metric",
    "allocation": "--allocation",
    "scope": "--scope",
    "refit": "--refit",
    "schedule": "--schedule",
    "sweep_dtype": "--sweep-dtype",
}
_REQUEST = {
    "source": "--calibration",
    "num_samples": "--num-samples",
    "seq_len": "--seq-len",
    "batch_size": "--batch-size",
    "seed": "--seed",
    "dtype": "--dtype",
    "device": "--device",
    "sharded": "--shard",
}


def command(report: CompressionReport, output: str) -> list[str] | None:
    """The command line that asks for the same again, every setting spelled out, so that no default can change it.

    Files and folders stand without the folders they lie in. ``None`` where the report does not say what was compressed,
    which is so where ``compress_`` was called from Python.
    """
    request = report.request
    if "model" not in request:
        return None
    processes = int(request.get("processes", 1))
    start = ["grasp"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "grasp"]
    options = [*_options(_CONFIG, report.config), *_options(_REQUEST, request)]
    return [*start, "compress", str(request["model"]), "-o", output, *options]


def by_option(words: list[str]) -> list[list[str]]:
    """The words of a command, line by line: what it starts with, then each of its ``--`` options with its value."""
    starts = [index for index, word in enumerate(words) if word.startswith("--") and index > words.index("compress")]
    return [words[i:j] for i, j in zip([0, *starts], [*starts, len(words)], strict=True)]


def _options(names: Mapping[str, str], values: Mapping[str, Any]) -> Iterator[str]:
    for name, option in names.items():
        value = values.get(name)
        if value is True:
            yield option
        elif isinstance(value, list):
            yield from (option, ",".join(map(str, value)))
        elif value is not None and value is not False:
            yield from (option, str(value))
