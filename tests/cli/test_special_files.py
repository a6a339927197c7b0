from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from grasp.cli import app
from grasp.errors import GraspError

INPUTS = {
    "compress": "compress builtin -o out --calibration {}",
    "evaluate": "evaluate builtin --text {}",
    "evaluate a model": "evaluate {}",
    "evaluate tasks": "evaluate builtin --tasks piqa --tasks-from {}",
    "inspect": "inspect {}",
    "report": "report {} -o page.html",
    "costs": "compress builtin -o out --target-latency 0.5 --costs {}",
    "costs of a dry run": "compress builtin -o out --target-latency 0.5 --dry-run --costs {}",
    "recover": "recover {} -o out",
    "convert": "convert {} -o out --to pivoted",
    "quantize": "quantize builtin -o out --calibration {}",
    "push": "push {} owner/name",
    "bench model": "bench model builtin --text {}",
    "bench ops": "bench ops --workload {}",
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder, with a named pipe, a loop of links and a folder; a command that hangs gets SIGALRM."""
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")
    Path("loop").symlink_to("loop")
    Path("folder").mkdir()
    signal.alarm(60)
    yield tmp_path
    signal.alarm(0)


@pytest.mark.parametrize("line", INPUTS.values(), ids=INPUTS)
def test_an_input_that_is_no_regular_file_is_refused(place: Path, line: str) -> None:
    for path in ("pipe", "loop", "folder", "/dev/zero", "/dev/full", "/dev/null"):
        if path == "folder" and line == INPUTS["evaluate tasks"]:
            continue  # its documents are looked for after the model is loaded
        result = CliRunner().invoke(app, line.format(path).split())
        assert isinstance(result.exception, GraspError | ValueError), result.exception
        assert len(str(result.exception).splitlines()) == 1
        assert sorted(os.listdir()) == ["folder", "loop", "pipe"]
        assert not os.listdir("folder")
