from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from speedgate import selftest, verdicts
from speedgate.selftest import SelfTest, Slowed, Trial
from speedgate.verdicts import Change, Entry

RunPytest = Callable[..., tuple[int, str]]

# Calls take no time but move the clock that the gate reads; each look at it by a busy loop moves it as well.
PROJECT = """
import types
import pytest
from speedgate import selftest, timing

now = 0.0

def advance(seconds):
    global now
    now += seconds
    return now

timing.time = types.SimpleNamespace(perf_counter=lambda: now)
selftest.time = types.SimpleNamespace(perf_counter=lambda: advance(1e-6))

@pytest.mark.parametrize("size", [1, 2])
def test_kernel(gate, size):
    gate(lambda _: advance(1e-4), lambda _: advance(2e-4), [None], label=f"kernel of size {size}")
"""


class Steady:
    """A batch whose two calls take 100 µs each."""

    calls = 2

    def seconds(self) -> float:
        return 1e-4


@pytest.mark.parametrize("fraction", [0.0, 0.3])
def test_a_slowed_batch_is_busy_for_a_fraction_of_its_time(fraction: float, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.count()
    monkeypatch.setattr(selftest, "time", SimpleNamespace(perf_counter=lambda: next(ticks) * 1e-6))
    assert Slowed(Steady(), fraction).seconds() == pytest.approx(1e-4 * (1 + fraction), abs=1e-6)


def change(ratio: float) -> Change:
    before, now = (Entry("call", "yardstick", (time,) * 20, (1.0,) * 20) for time in (1.0, ratio))
    return next(verdicts.compare_entries(before, now, "cpu"))


@pytest.mark.parametrize(
    ("unchanged", "slowed", "verdict"),
    [(1.0, 1.3, "caught"), (1.0, 1.1, "missed"), (1.2, 1.3, "false alarm"), (1.2, 1.1, "false alarm")],
)
def test_a_self_test_counts_both_kinds_of_error(unchanged: float, slowed: float, verdict: str) -> None:
    good = Trial("good", change(1.0), change(1.3))
    trial = Trial("call", change(unchanged), change(slowed))
    result = SelfTest([good, trial], 0.3)
    assert (trial.verdict, result.failed) == (verdict, verdict != "caught")
    caught, false = 1 + (slowed > 1.15), int(unchanged > 1.15)
    assert result.tally == f"slowed by 30%: {caught} of 2 caught; unchanged: {false} of 2 called slower"


@pytest.mark.slow
def test_every_benchmark_of_a_project_is_slowed_down(tmp_path: Path, run_pytest: RunPytest) -> None:
    (tmp_path / "test_speed.py").write_text(PROJECT)
    code, output = run_pytest(tmp_path, "--gate-selftest", "--gate-markdown=summary.md")
    assert code == 0, output
    assert "caught: kernel of size 2: slowed +30% (+30% to +30%), unchanged +0% (+0% to +0%)" in output
    assert "slowed by 30%: 2 of 2 caught; unchanged: 0 of 2 called slower" in output
    assert "| ✅ caught | kernel of size 2 | +30% (" in (tmp_path / "summary.md").read_text()
    assert not list(tmp_path.rglob("*.json"))


@pytest.mark.slow
def test_a_slowdown_within_the_threshold_and_two_modes_are_refused(tmp_path: Path, run_pytest: RunPytest) -> None:
    code, output = run_pytest(tmp_path, "--gate=compare", "--gate-threads=0")
    assert (code, "--gate-threads=0: expected at least 1" in output) == (4, True)
    code, output = run_pytest(tmp_path, "--gate-selftest=nan")
    assert (code, "expected more per cent than the threshold" in output) == (4, True)
    code, output = run_pytest(tmp_path, "--gate-selftest=15")
    assert (code, "expected more per cent than the threshold of 15" in output) == (4, True)
    code, output = run_pytest(tmp_path, "--gate-selftest", "--gate=save")
    assert (code, "expected one of --gate, --gate-selftest" in output) == (4, True)
