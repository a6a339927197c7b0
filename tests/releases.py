"""The releases of libraries with which the whole suite has passed: a record that the run writes, and its table."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RECORD = Path(__file__).parents[1] / "benchmarks" / "results" / "releases.json"
LIBRARIES = ("torch", "triton", "transformers", "kernels", "peft", "accelerate", "numpy")
RUNS = ("oldest", "lock", "latest")  # of make test-oldest, test, test-latest


def installed(name: str) -> str | None:
    """The version without the local part, which names a build such as CUDA's."""
    try:
        return version(name).partition("+")[0]
    except PackageNotFoundError:
        return None


def record(run: str, counts: Mapping[str, int], path: Path = RECORD) -> None:
    """Replace what the record has of a kind of run by this process's versions, and how many tests passed."""
    runs = json.loads(path.read_text()) if path.exists() else {}
    versions = {"python": platform.python_version(), **{name: installed(name) for name in LIBRARIES}}
    runs[run] = {"date": time.strftime("%Y-%m-%d"), **counts, "versions": versions}
    path.write_text(json.dumps({name: runs[name] for name in RUNS if name in runs}, indent=2) + "\n")


def table(path: Path = RECORD) -> str:
    """The record in Markdown, a column for each run."""
    runs = json.loads(path.read_text())
    rows = [["", *runs], ["---", *["--:"] * len(runs)]]
    rows += [[name, *(run["versions"][name] or "none" for run in runs.values())] for name in ("python", *LIBRARIES)]
    rows += [[f"tests {name}", *(str(run[name]) for run in runs.values())] for name in ("passed", "skipped")]
    rows += [["date", *(run["date"] for run in runs.values())]]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)
