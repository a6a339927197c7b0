from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.compression import process_scaling
from benchmarks.compression.process_scaling import ScalingJob, measure, print_results
from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.config import GraspConfig
from tests.tiny_models import tiny_batches, tiny_model

JOB = ScalingJob("tiny", "sequential", layers=1, retain_ratio=0.4, sequences=2, seq_len=12)


def reports(monkeypatch: pytest.MonkeyPatch, *, same: bool) -> None:
    """Stand-ins for runs: two processes take 6 s where one takes 10 s, and a matrix product gains a factor of 2."""
    model, other = tiny_model("llama"), tiny_model("llama", seed=7)
    config = GraspConfig(layers=(1,), retain_ratio=0.4)
    made = {1: compress_(model, tiny_batches(1), config)}
    made[2] = made[1] if same else compress_(other, tiny_batches(1), config)

    def run(job: ScalingJob, processes: int) -> CompressionReport:
        seconds = {
            1: {"block_influence": 4.0, "prefix": 2.0, "attribution": 8.0},
            2: {"block_influence": 0.0, "prefix": 1.0, "attribution": 5.0},
        }
        return dataclasses.replace(made[processes], seconds=seconds[processes])

    monkeypatch.setattr(process_scaling, "run", run)
    monkeypatch.setattr(process_scaling, "gemm_seconds", lambda threads: 1.0 / threads)


def test_the_gain_is_of_prefix_and_attribution_and_is_set_against_that_of_threads(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports(monkeypatch, same=True)
    alone, two = measure(JOB, (1, 2))
    assert (alone.attribution, two.attribution) == (10.0, 6.0)
    assert two.attribution_speedup == pytest.approx(10 / 6)
    assert two.total_speedup == pytest.approx(14 / 6)
    assert two.thread_speedup == pytest.approx(2.0)
    assert two.share_of_thread_speedup == pytest.approx(10 / 12)
    print_results([alone, two])
    assert capsys.readouterr().out.split()[-3:] == ["share", "100%", "83%"]
    assert json.loads(json.dumps(dataclasses.asdict(two)))["processes"] == 2


def test_nothing_is_reported_where_the_selections_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    reports(monkeypatch, same=False)
    with pytest.raises(RuntimeError, match="chose different singular groups"):
        measure(JOB, (1, 2))
