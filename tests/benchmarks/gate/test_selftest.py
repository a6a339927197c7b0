from __future__ import annotations

import subprocess
import sys

import pytest

from benchmarks.gate import selftest
from benchmarks.gate.selftest import ROOT, Trial
from benchmarks.gate.slowdown import SLOWDOWN, slowed
from grasp.bench.workloads import Problem
from tests.command_line import environment


def test_a_planted_slowdown_makes_the_call_and_takes_its_share_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    calls: list[tuple[str, object]] = []

    def clock() -> float:
        now[0] += 1e-6
        return now[0]

    def run(backend: str, problem: Problem) -> list[object]:
        calls.append((backend, problem))
        now[0] += 1.0
        return ["result"]

    monkeypatch.setattr("time.perf_counter", clock)
    assert slowed(run)("cpu", "problem") == ["result"]  # type: ignore[arg-type, comparison-overlap]
    assert calls == [("cpu", "problem")]
    assert now[0] == pytest.approx(1 + SLOWDOWN, abs=1e-4)


@pytest.mark.parametrize(
    ("slow_op", "code", "regressions", "right"),
    [
        (None, 0, [], True),
        (None, 1, ["lowrank_glu"], False),
        (None, 2, [], False),
        ("lowrank_glu", 1, ["lowrank_glu"], True),
        ("lowrank_glu", 0, [], False),
        ("lowrank_glu", 1, [], False),
        ("lowrank_glu", 1, ["lowrank_glu", "lowrank_linear"], False),
        ("lowrank_glu", 1, ["lowrank_linear"], False),
    ],
)
def test_a_trial_is_right_if_it_names_the_slow_op_and_no_other(
    slow_op: str | None, code: int, regressions: list[str], right: bool
) -> None:
    assert Trial(slow_op, code, regressions, "").right == right


@pytest.mark.slow
def test_the_selection_is_of_benchmarks_that_exist() -> None:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "--benchmark-enable", *selftest.test_ids()]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert f"{len(selftest.SELECTION)} tests collected" in run.stdout
