"""Real processes, really killed."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp.config import GraspConfig
from grasp.errors import ResumeError
from grasp.workflows.compress import compress
from grasp.workflows.samples import Samples
from tests import command_line

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 200
# What `python -m grasp` does, but the sums of a sweep are kept after every batch rather than twice a minute.
OFTEN = """
import runpy
from grasp.checkpoint import run_folder
run_folder.INTERVAL, run_folder.WRITE_FRACTION = 0.0, float("inf")
runpy.run_module("grasp", run_name="__main__")
"""


class Command:
    """``grasp compress`` of a tiny model, in processes of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place
        command_line.save_tiny_model(place / "model")
        (place / "text.txt").write_text(TEXT)

    def start(self, output: str, *options: object, often: bool) -> subprocess.Popen[str]:
        arguments: list[object] = ["compress", "model", "-o", output, "--calibration", "text.txt", "--json"]
        arguments += ["--layers", "0-2", "--retain-ratio", 0.4, "--num-samples", 40, "--seq-len", 64]
        arguments += ["--preset", "paper", *options]
        return subprocess.Popen(
            [sys.executable, *(("-c", OFTEN) if often else ("-m", "grasp")), *map(str, arguments)],
            cwd=self.place,
            env=command_line.environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def here(self, output: str, schedule: str) -> None:
        """The same job with a schedule, in this process."""
        samples = Samples(str(self.place / "text.txt"), num_samples=40, seq_len=64)
        config = GraspConfig(layers=(0, 1, 2), retain_ratio=0.4, schedule=schedule)
        compress(str(self.place / "model"), self.place / output, config, samples)

    def killed(self, output: str, modules: int, delay: float) -> None:
        """Kill a process ``delay`` seconds after it has kept so many linears, unless it has ended by then."""
        process = self.start(output, often=True)
        while process.poll() is None and (not self.has_begun(output) or self.kept(output) < modules):
            time.sleep(0.001)
        time.sleep(delay)
        process.kill()
        process.communicate(timeout=60)

    def has_begun(self, output: str) -> bool:
        """Whether anything was kept."""
        return (self.partial(output) / "state.json").exists()

    def kept(self, output: str) -> int:
        """How many linears are kept."""
        state = (
            json.loads((self.partial(output) / "state.json").read_text()) if self.has_begun(output) else {"files": {}}
        )
        return sum(stem.startswith("module-") for stem in state["files"])

    def partial(self, output: str) -> Path:
        return self.place / f"{output}.partial"

    def modules(self, output: str) -> Any:
        return json.loads((self.place / output / "report.json").read_text())["modules"]

    def weights(self, output: str) -> bytes:
        return (self.place / output / "model.safetensors").read_bytes()


def when(event: Callable[[], bool], process: subprocess.Popen[str]) -> float:
    """Wait for an event in the life of a process, which must come; the time."""
    while not event():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    return time.perf_counter()


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    return Command(tmp_path_factory.mktemp("command"))


@pytest.mark.slow
def test_a_process_killed_at_a_random_point_is_continued_to_the_same_end(
    command: Command, request: pytest.FixtureRequest
) -> None:
    """The points are spread over the 6 sweeps, whose 21 linears are kept one by one, and over the saving."""
    process = command.start("whole", often=True)
    begin = when(lambda: command.has_begun("whole"), process)
    duration = when(lambda: not command.partial("whole").exists(), process) - begin
    process.communicate(timeout=60)
    assert process.returncode == 0
    assert len(command.modules("whole")) == 21

    kills, points, continued = request.config.getoption("kills"), random.Random(0), 0
    for number in range(kills):
        output = f"killed-{number}"
        modules = int(22 * points.uniform(number, number + 1) / kills)
        command.killed(output, modules, points.uniform(0, duration / 6))
        if not (command.place / output).exists():
            process = command.start(output, often=True)
            _, err = process.communicate(timeout=300)
            assert process.returncode == 0, err
            continued += "resuming: " in err
            left = {path.name for path in command.place.iterdir() if output in path.name}
            assert left == {output}
        assert command.modules(output) == command.modules("whole")
        assert command.weights(output) == command.weights("whole")
    assert continued >= kills // 2


@pytest.mark.slow
def test_the_plain_command_is_continued_or_refused_with_the_reason(command: Command) -> None:
    options = ("--schedule", "per-layer")
    process = command.start("plain", *options, often=False)
    when(lambda: command.kept("plain") >= 7, process)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ResumeError, match="is in use by another process"):
        command.here("plain", "per-layer")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    with pytest.raises(ResumeError, match="schedule is sequential, expected per-layer"):
        command.here("plain", "sequential")

    again = command.start("plain", *options, often=False)
    out, err = again.communicate(timeout=60)
    assert again.returncode == 0
    assert "resuming: 1 of 3 sweeps done" in err.splitlines()
    assert json.loads(out)["report"]["modules"] == command.modules("plain")
    assert not command.partial("plain").exists()
