"""Projects that the tests write, and a pytest for them in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1]

RunPytest = Callable[..., tuple[int, str]]
WriteVersion = Callable[..., None]

# The module says which version it is, by its time. Calls take no time but move the clock that the gate reads.
TEST = """
import types
import pytest
import kernel
from speedgate import timing

now = 0.0
timing.time = types.SimpleNamespace(perf_counter=lambda: now)

def call(operand):
    global now
    now += kernel.SECONDS

@pytest.mark.parametrize("size", [1, 2])
def test_kernel(gate, size):
    gate(call, call, [None], label=f"kernel of size {size}", measures={"bytes": lambda call: kernel.BYTES})

def test_that_does_not_time():
    pass
"""


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
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
        plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_benchmark.plugin,speedgate.plugin"}
        everything = {**environment, **plugins, **variables}
        done = subprocess.run(command, cwd=folder, env=everything, capture_output=True, text=True, timeout=300)
        return done.returncode, done.stdout + done.stderr

    return run


@pytest.fixture
def write_version() -> WriteVersion:
    """Write a version of a project whose calls take a time and a number of bytes."""

    def write(folder: Path, seconds: float, size: int = 5) -> None:
        (folder / "src").mkdir(parents=True, exist_ok=True)
        (folder / "src" / "kernel.py").write_text(f"SECONDS, BYTES = {seconds}, {size}\n")
        (folder / "test_speed.py").write_text(TEST)
        (folder / "pytest.ini").write_text("[pytest]\npythonpath = src\n")

    return write


@pytest.fixture
def project(tmp_path: Path, write_version: WriteVersion) -> Path:
    """A repository of two commits: the second is slower."""
    folder = tmp_path / "project"
    folder.mkdir()

    def git(*arguments: str) -> None:
        author = ("-c", "user.name=a", "-c", "user.email=a@b")
        subprocess.run(["git", *author, *arguments], cwd=folder, check=True)

    git("init", "--quiet")
    for seconds in (1e-4, 1.3e-4):
        write_version(folder, seconds)
        git("add", ".")
        git("commit", "--quiet", "-m", "a version")
    return folder
