"""Real processes, really killed."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp.checkpoint import run_folder
from grasp.config import GraspConfig
from grasp.errors import ResumeError
from grasp.recovery import RecoveryConfig
from grasp.statistics.processes import Processes
from grasp.workflows.compress import compress
from grasp.workflows.recover import TrainingData, recover
from grasp.workflows.samples import Samples
from tests import command_line, forked, interrupted, many_processes

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 200


STRESSED = ("paper", "best")
KINDS = ("paper", "best", "best in little memory", "recover", "two processes")

# phase of best → whether state.json shows that it has begun
PHASES: dict[str, Callable[[Any], bool]] = {
    "the first round": lambda state: listed(state, "first") >= 2,
    "the cut": lambda state: listed(state, "cut") >= 1,
    "the second round": lambda state: listed(state, "second") >= 2,
    "the decision": lambda state: state["decision"] is not None,
    "the refit": lambda state: listed(state, "module") >= 1,
}


def listed(state: Any, kind: str) -> int:
    return sum(stem.startswith(f"{kind}-") for stem in state["files"])


def work(processes: Processes, kind: str, place: Path, output: str) -> None:
    """A compression or a recovery that stores its progress as often as it can."""
    run_folder.INTERVAL, run_folder.WRITE_FRACTION = 0.0, float("inf")
    text = str(place / "text.txt")
    if kind == "recover":
        config = RecoveryConfig(1e-2, 4000, 8)
        recover(place / "small", place / output, config, TrainingData(text, None, 32), processes=processes)
        return
    config = GraspConfig(layers=(0, 1, 2), retain_ratio=0.4)
    if kind.startswith("best"):
        config = GraspConfig.best(compression_ratio=0.1)
    if kind == "best in little memory":
        interrupted.take_little_memory()
    samples = Samples(text, num_samples=16, seq_len=64, batch_size=4)
    compress(str(place / "model"), place / output, config, samples, processes=processes)


class Runs:
    """Runs of one kind, of which processes are killed."""

    def __init__(self, kind: str, place: Path) -> None:
        self.kind, self.place = kind, place
        self.size = 2 if kind == "two processes" else 1
        self.seconds = 0.0  # of a whole run, from the first stored state
        self.kills = self.ends = self.kept = 0

    def finish(self, output: str) -> bytes:
        """Run to the end; the weights and the modules of the report."""
        children = self.start(output)
        begin = self.wait_for_state(output, children)
        for outcome in many_processes.outcomes(children):
            assert outcome.error is None, outcome.error
        self.seconds = self.seconds or time.perf_counter() - begin
        assert not (self.place / f"{output}.partial").exists()
        report = json.loads((self.place / output / "report.json").read_text())
        return (self.place / output / "model.safetensors").read_bytes() + json.dumps(report["modules"]).encode()

    def kill(self, output: str, point: float, victims: list[int]) -> None:
        """Kill ``victims`` at ``point``, a fraction of a whole run, unless they have ended by then."""
        children = self.start(output)
        begin = self.wait_for_state(output, children)
        self.kill_when(lambda: time.perf_counter() >= begin + point * self.seconds, output, children, victims)

    def kill_in(self, output: str, phase: str) -> None:
        """Kill the process in a phase of ``best``."""
        children = self.start(output)
        self.wait_for_state(output, children)
        self.kill_when(lambda: self.is_in(output, phase), output, children, [0])
        assert self.is_in(output, phase)

    def is_in(self, output: str, phase: str) -> bool:
        """Whether a phase of ``best`` has begun."""
        return PHASES[phase](json.loads((self.place / f"{output}.partial" / "state.json").read_text()))

    def kill_when(
        self, event: Callable[[], bool], output: str, children: list[many_processes.Child], victims: list[int]
    ) -> None:
        """Kill ``victims`` once an event has come, unless they have ended by then."""
        while not event() and children[0][0].is_alive():
            time.sleep(0.0005)
        for rank in victims:
            children[rank][0].kill()
        for process, _ in children:  # as torchrun does; a process that waits for the others to start waits for long
            process.join(0.5)
            process.kill()
        self.kills += any(outcome.exit_code == -signal.SIGKILL for outcome in many_processes.outcomes(children))
        partial = self.place / f"{output}.partial"
        self.kept += (partial / "state.json").exists()
        if partial.exists() and (self.place / output).exists() and not (partial / "state.json").exists():
            partial.rmdir()  # empty: killed between the last two calls

    def start(self, output: str) -> list[many_processes.Child]:
        return many_processes.start(work, self.kind, self.place, output, size=self.size)

    def wait_for_state(self, output: str, children: list[many_processes.Child]) -> float:
        path = self.place / f"{output}.partial" / "state.json"
        while not path.exists() and children[0][0].is_alive():
            time.sleep(0.0005)
        return time.perf_counter()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_killed_runs_end_with_the_same_bits(kind: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each run is killed up to three times, by SIGKILL, at random points up to its very end."""
    wanted = request.config.getoption("kills")
    if kind.startswith(STRESSED) and wanted == 1:
        pytest.skip("make stress runs this; two processes stand for paper, and the next test kills best in each phase")
    command_line.save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    if kind == "recover":
        samples = Samples(str(tmp_path / "text.txt"), num_samples=2, seq_len=32)
        compress(str(tmp_path / "model"), tmp_path / "small", GraspConfig(layers=(1,), retain_ratio=0.4), samples)
    runs, points = Runs(kind, tmp_path), random.Random(kind)
    expected = runs.finish("whole")
    while runs.kills < wanted:
        output = f"killed-{runs.ends}"
        for _ in range(min(points.choice((1, 1, 2, 3)), wanted - runs.kills)):
            victims = points.sample(range(runs.size), points.randint(1, runs.size))
            runs.kill(output, points.uniform(0, 1.1), victims)
            if (tmp_path / output).exists():
                break
        if not (tmp_path / output).exists() or (tmp_path / f"{output}.partial").exists():
            assert runs.finish(output) == expected, f"{kind}, {output}"
        assert {path.name for path in tmp_path.iterdir() if output in path.name} == {output}
        shutil.rmtree(tmp_path / output)
        runs.ends += 1
    print(f"\n{kind}: {runs.kills} kills, {runs.kept} run folders kept, {runs.ends} of {runs.ends} ends bit-identical")


@pytest.mark.slow
def test_best_is_killed_in_each_phase_and_continued_with_another_budget(tmp_path: Path) -> None:
    command_line.save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    plenty, little = Runs("best", tmp_path), Runs("best in little memory", tmp_path)
    expected = plenty.finish("whole")
    for number, phase in enumerate(PHASES):
        (little, plenty)[number % 2].kill_in("killed", phase)
    assert little.finish("killed") == expected
    assert (little.kills, plenty.kills) == (3, 2)


@pytest.mark.slow
def test_the_plain_command_is_continued_or_refused_with_the_reason(tmp_path: Path) -> None:
    command_line.save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ("--layers", "0-2", "--retain-ratio", 0.4, "--num-samples", 40, "--seq-len", 64, "--preset", "paper")
    options += ("--calibration", "text.txt", "--schedule", "per-layer", "--json")
    arguments = [str(word) for word in ("compress", "model", "-o", "plain", *options)]

    def here(schedule: str) -> None:
        """The same job with a schedule, in this process."""
        config = GraspConfig(layers=(0, 1, 2), retain_ratio=0.4, schedule=schedule)
        samples = Samples(str(tmp_path / "text.txt"), num_samples=40, seq_len=64)
        compress(str(tmp_path / "model"), tmp_path / "plain", config, samples)

    state = tmp_path / "plain.partial" / "state.json"
    process, _, err = forked.start(
        command_line.MAIN, arguments, cwd=tmp_path, environment=command_line.environment(), streams=tmp_path
    )
    while not (state.exists() and listed(json.loads(state.read_text()), "module") >= 7):
        assert process.is_alive(), err.read_text()
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(ResumeError, match="is in use by another process"):
        here("per-layer")
    process.kill()
    process.join(60)
    with pytest.raises(ResumeError, match="schedule is sequential, expected per-layer"):
        here("sequential")

    again = command_line.grasp(*arguments, cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "resuming: 1 of 3 sweeps done" in again.stderr.splitlines()
    report = json.loads((tmp_path / "plain" / "report.json").read_text())
    assert json.loads(again.stdout)["report"]["modules"] == report["modules"]
    assert not state.parent.exists()
