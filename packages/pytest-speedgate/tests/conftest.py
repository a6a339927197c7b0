"""A pytest in a process of its own, for projects that the tests write."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]

RunPytest = Callable[..., tuple[int, str]]


@pytest.fixture
def environment() -> dict[str, str]:
    """For subprocesses: speedgate is importable; they are no workers of pytest-xdist, in which nothing is timed."""
    left_out = ("PYTEST_", "GITHUB_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "PYTHONPATH": str(PACKAGE)}


@pytest.fixture
def run_pytest(environment: dict[str, str]) -> RunPytest:
    """Run pytest in a folder with these options; its exit code, and all that it printed."""

    def run(folder: Path, *options: str, **variables: str) -> tuple[int, str]:
        plugins = ["-p", "no:cacheprovider", "-p", "pytest_benchmark.plugin", "-p", "speedgate.plugin"]
        command = [sys.executable, "-m", "pytest", *plugins, *options]
        everything = {**environment, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **variables}
        done = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run
