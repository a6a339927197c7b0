"""The command line that repeats a compression, from its report. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grasp.checkpoint.compression_report import CompressionReport

_NOT_OPTIONS = ("model", "processes", "grasp")  # keys of a request that are not options of the command


def rerun_command(report: CompressionReport, output: str) -> list[str] | None:
    """The command line of the same compression, with every setting spelled out: no later default changes it.

    Files and folders are named without the folders that they lie in. ``None`` if the report does not name the model,
    because ``compress_`` was called from Python.
    """
    request = report.request
    if "model" not in request:
        return None
    processes = int(request.get("processes", 1))
    start = ["grasp"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "grasp"]
    settings = {name: value for name, value in request.items() if name not in _NOT_OPTIONS}
    options = _options({"preset": "paper", **report.config, **settings})  # "paper": options left out are off
    return [*start, "compress", str(request["model"]), "-o", output, *options]


def by_option(words: list[str]) -> list[list[str]]:
    """The words of a command, line by line: its start, then each ``--`` option with its value."""
    starts = [index for index, word in enumerate(words) if word.startswith("--") and index > words.index("compress")]
    return [words[i:j] for i, j in zip([0, *starts], [*starts, len(words)], strict=True)]


def _options(values: Mapping[str, Any]) -> Iterator[str]:
    """``retain_ratio`` is ``--retain-ratio``; false values and ``None`` are left out."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, (list, tuple)):
            yield from (option, ",".join(map(str, value)))
        elif value is not None and value is not False:
            yield from (option, str(value))
