"""Recorded runs: pytest-benchmark's JSON documents, one folder per device, read with checks."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from statistics import median
from typing import Any

from speedgate.verdicts import MEASURES, BaselineError, Document, Entry, Where, median_interval, microseconds

KEY = "gate"  # of the gate's part of pytest-benchmark's machine_info and extra_info


def read(path: Path) -> Document:
    """Read a document that the plugin has recorded with pytest-benchmark.

    Raises:
        BaselineError: if the file is missing or damaged, or was not recorded with ``--gate``.
    """
    try:
        return parse(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise BaselineError(
            f"{path} cannot be read ({error.strerror}); expected a file that was recorded with --gate"
        ) from error
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise BaselineError(f"{path} is damaged, or not recorded with --gate: {reason}; move it away") from error


def parse(document: Any) -> Document:
    """Parse a document of pytest-benchmark; benchmarks without the gate are left out.

    Raises:
        ValueError, TypeError, KeyError, AttributeError or OverflowError: if a field is missing or wrong.
    """
    entries = {
        str(benchmark["fullname"]): _entry(info)
        for benchmark in document["benchmarks"]
        if (info := benchmark["extra_info"].get(KEY)) is not None
    }
    machine = document["machine_info"][KEY]
    where = Where(str(machine["kind"]), str(machine["device"]), int(machine["threads"]))
    if where.kind not in MEASURES:
        raise ValueError(f"unknown kind of device {where.kind!r}, expected one of {', '.join(MEASURES)}")
    commit = str(document["commit_info"].get("id"))[:12]
    torch = f", torch {machine['torch']}" if machine.get("torch") else ""
    return Document(where, entries, f"{document['datetime']}, commit {commit}{torch}")


def _entry(info: Any) -> Entry:
    ours, theirs = (tuple(float(value) for value in info[name]) for name in ("seconds", "yardstick_seconds"))
    if len(ours) != len(theirs) or not all(0 < time < math.inf for time in ours + theirs):
        raise ValueError("times must be positive numbers, as many of the yardstick as of the call")
    median_interval(ours)
    measures = {  # earlier versions have none
        str(name): tuple(float(value) for value in values) for name, values in info.get("measures", {}).items()
    }
    if not all(values and all(0 <= value < math.inf for value in values) for values in measures.values()):
        raise ValueError("measures must be lists of numbers that are not negative")
    return Entry(str(info["label"]), str(info["against"]), ours, theirs, measures)


def device_folder(storage: Path, where: Where) -> Path:
    """Folder of a device's baselines."""
    return storage / (re.sub(r"[^a-z0-9]+", "-", where.device.lower()).strip("-") or "unknown")


def latest(folder: Path, machine: str) -> Path:
    """The last document of a ``machine`` (pytest-benchmark's name of OS and Python) in a device's folder.

    Raises:
        BaselineError: if there is none.
    """
    numbered = {path: path.name.split("_")[0] for path in (folder / machine).glob("[0-9]*_*.json")}
    saved = sorted((path for path, number in numbered.items() if number.isdecimal()), key=lambda p: int(numbered[p]))
    if not saved:
        others = sorted(str(path.relative_to(folder.parent).parent) for path in folder.parent.glob("*/*/[0-9]*_*.json"))
        existing = f"baselines exist for {', '.join(dict.fromkeys(others))}" if others else "no baselines exist"
        raise BaselineError(f"no baseline in {folder / machine}; {existing}; record one with --gate=save")
    return saved[-1]


def smaller_is_better(document: Document) -> list[dict[str, Any]]:
    """The ratios for github-action-benchmark, tool ``customSmallerIsBetter``."""
    results = []
    for entry in document.entries.values():
        interval = median_interval(entry.values("ratio"))
        results.append(
            {
                "name": entry.label,
                "unit": f"× {entry.against}",
                "value": interval.median,
                "range": f"{interval.low:.4g} to {interval.high:.4g}",
                "extra": f"{microseconds(median(entry.seconds))} on {document.where}",
            }
        )
    return results
