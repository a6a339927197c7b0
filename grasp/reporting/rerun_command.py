"""The command line that repeats a compression, from its report. Pure functions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from inspect import signature
from typing import Any

from grasp.checkpoint.compression_report import CompressionReport
from grasp.config import PRESETS, GraspConfig

_NOT_OPTIONS = ("model", "processes", "grasp")  # keys of a request that are not options of the command
_OFF = {"refit": "--no-refit"}  # options whose ``False`` is spelled out


def rerun_command(report: CompressionReport, output: str) -> list[str] | None:
    """The command line of the same compression, with every setting spelled out: no later default changes it.

    Files and folders are named without the folders that they lie in. ``None`` if the report does not name the model,
    because ``compress_`` was called from Python, or if no preset makes its configuration.
    """
    request, settings = report.request, _preset_options(report.config)
    if "model" not in request or settings is None:
        return None
    processes = request.get("processes", 1)
    start = ["grasp"] if processes == 1 else ["torchrun", "--nproc-per-node", str(processes), "-m", "grasp"]
    settings |= {name: value for name, value in request.items() if name not in _NOT_OPTIONS}
    return [*start, "compress", str(request["model"]), "-o", output, *_words(settings)]


def later_form(report: CompressionReport) -> str | None:
    """The form that `grasp convert` gave the linears after the compression; ``None`` if they are as compressed."""
    form = "pivoted" if any(module.form == "pivoted" for module in report.compressed) else "factored"
    return form if report.compressed and form != report.config.get("form", "factored") else None


def by_option(words: list[str]) -> list[list[str]]:
    """The words of a command, line by line: its start, then each ``--`` option with its value."""
    starts = [index for index, word in enumerate(words) if word.startswith("--") and index > words.index("compress")]
    return [words[i:j] for i, j in zip([0, *starts], [*starts, len(words)], strict=True)]


def _preset_options(values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The preset that makes a configuration, with its options; ``None`` if no preset does."""
    for preset, constructor in PRESETS.items():
        for ignored in ((), ("retain_ratio",)):  # a preset refuses it where it means nothing
            names = [name for name in signature(constructor).parameters if name not in ignored]
            with suppress(ValueError, TypeError, LookupError, AttributeError):
                config = GraspConfig.from_dict(values)
                options = {name: getattr(config, name) for name in names}
                if constructor(**options) == config:
                    return {"preset": preset, **options}
    return None


def _words(values: Mapping[str, Any]) -> Iterator[str]:
    """``retain_ratio`` is ``--retain-ratio``; false values and ``None`` are left out, unless ``_OFF`` has them."""
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            yield option
        elif isinstance(value, (list, tuple)):
            yield from (option, ",".join(map(str, value)))
        elif value is False and name in _OFF:
            yield _OFF[name]
        elif value is not None and value is not False:
            yield from (option, str(value))
