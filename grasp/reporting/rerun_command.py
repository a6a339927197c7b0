"""The command that makes a compression again, from what its report has. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from grasp.checkpoint.compression_report import CompressionReport

# What a request has beside options.
_NOT_OPTIONS = ("model", "processes", "grasp")


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
    asked = {name: value for name, value in request.items() if name not in _NOT_OPTIONS}
    options = _options({"preset": "paper", **report.config, **asked})  # in which all that is left out is off
    return [*start, "compress", str(request["model"]), "-o", output, *options]


def by_option(words: list[str]) -> list[list[str]]:
    """The words of a command, line by line: what it starts with, then each of its ``--`` options with its value."""
    starts = [index for index, word in enumerate(words) if word.startswith("--") and index > words.index("compress")]
    return [words[i:j] for i, j in zip([0, *starts], [*starts, len(words)], strict=True)]


def _options(values: Mapping[str, Any]) -> Iterator[str]:
    """``retain_ratio`` is ``--retain-ratio``; what is false or ``None`` is left out."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, (list, tuple)):
            yield from (option, ",".join(map(str, value)))
        elif value is not None and value is not False:
            yield from (option, str(value))
