from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import pytest
from torch import Tensor

from grasp.bench import compress as bench_compress
from grasp.bench.compress_records import CompressResult
from grasp.bench.race import Race, WrongSelectionError, race
from grasp.bench.results import read_results
from grasp.evaluation.perplexity import PerplexityResult
from grasp.method.svd import SVD
from grasp.statistics.gradients import DenseSum, FactoredSum
from tests.command_line import RunMain

SIZES = ("--retain-ratio", "0.4", "--num-samples", "4", "--seq-len", "16", "--timed-batches", "2", "--threads", "1")


@pytest.fixture
def run(bench: RunMain, tiny: Path) -> RunMain:
    return lambda *arguments: bench("compress", tiny, *SIZES, "--device", "cpu", *arguments)


def rows(path: Path) -> list[CompressResult]:
    records = read_results(path)
    assert all(isinstance(record, CompressResult) for record in records)
    return records  # type: ignore[return-value]


def test_every_schedule_is_measured_and_chooses_what_the_formulas_choose(run: RunMain, tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    outcome = run("--num-layers", "2", "-o", output)
    assert outcome.code == 0, outcome.err
    by_schedule = {row.schedule: row for row in rows(output)}
    assert list(by_schedule) == ["sequential", "per-layer", "single-sweep"]
    for row in by_schedule.values():
        assert row.groups > 0
        assert row.largest_gap <= 1e-3
        assert row.extrapolated
        assert row.timed_sequences == 2
        assert 0 < row.seconds_prefix + row.seconds_contraction < row.seconds
        assert row.speedup == pytest.approx(row.yardstick_seconds / row.seconds)
        assert row.share_of_predicted == pytest.approx(row.speedup / row.predicted_speedup)
        assert row.yardstick_seconds == by_schedule["sequential"].naive_seconds
        assert row.conditions.threads == 1
    assert 1 < by_schedule["sequential"].predicted_speedup < by_schedule["per-layer"].predicted_speedup
    assert by_schedule["per-layer"].predicted_speedup < by_schedule["single-sweep"].predicted_speedup
    assert "extrapolated" in outcome.out
    assert "decompositions are not measured" in outcome.text


def test_the_whole_set_is_extrapolated_from_nothing(run: RunMain, tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    outcome = run("--layers", "1", "--schedule", "sequential", "--full", "-o", output)
    assert outcome.code == 0, outcome.err
    (row,) = rows(output)
    assert not row.extrapolated
    assert row.timed_sequences == row.sequences == 4
    assert "extrapolated" not in outcome.out


def test_sweeps_in_bfloat16_are_judged_by_perplexity(run: RunMain, tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    arguments = ("--layers", "1", "--schedule", "single-sweep", "--sweep-dtype", "bfloat16", "--batch-size", "2")
    outcome = run(*arguments, "-o", output)
    assert outcome.code == 0, outcome.err
    yardstick, row = rows(output)
    assert (yardstick.schedule, yardstick.sweep_dtype, yardstick.batch_size) == ("sequential", None, 1)
    assert yardstick.perplexity is None
    assert (row.sweep_dtype, row.batch_size, row.timed_sequences) == ("bfloat16", 2, 4)
    assert row.share_of_predicted is None
    assert row.perplexity == pytest.approx(row.perplexity_fp32, rel=0.1)


def test_a_perplexity_that_is_no_number_costs_no_result(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    infinite = PerplexityResult(float("inf"), float("inf"), tokens=5, windows=1, nonfinite=5, window=16, stride=16)
    monkeypatch.setattr(bench_compress, "perplexity", lambda *_, **__: infinite)
    output = tmp_path / "compress.jsonl"
    outcome = run("--layers", "1", "--schedule", "single-sweep", "--sweep-dtype", "bfloat16", "-o", output)
    assert outcome.code == 0, outcome.err
    assert [(row.perplexity, row.perplexity_fp32) for row in rows(output)] == [(None, None)] * 2
    assert "A perplexity of single-sweep is NaN or infinite." in outcome.text
    assert "A perplexity of sequential" not in outcome.text


def test_a_wrong_selection_is_not_reported(run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in (DenseSum, FactoredSum):

        def flipped(total: Any, weight: Tensor, result: Any = kind.result) -> tuple[SVD, Tensor]:
            svd, grad = result(total, weight)
            return svd, grad.flip(0)

        monkeypatch.setattr(kind, "result", flipped)
    outcome = run("--layers", "1", "-o", tmp_path / "compress.jsonl")
    assert (outcome.code, outcome.out) == (1, "")
    assert "this schedule is not reported" in outcome.err
    assert not (tmp_path / "compress.jsonl").exists()


def wrong(*_: object, **__: object) -> NoReturn:
    raise WrongSelectionError("they differ")


def interrupted(*_: object, **__: object) -> NoReturn:
    raise KeyboardInterrupt


@pytest.mark.parametrize(("end", "code"), [(interrupted, 130), (wrong, 1)])
def test_finished_schedules_are_saved_before_the_next_one(
    end: Callable[..., Race], code: int, run: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    races = iter([race, race, end])
    monkeypatch.setattr(bench_compress, "race", lambda *arguments, **options: next(races)(*arguments, **options))
    output = tmp_path / "compress.jsonl"
    outcome = run("--layers", "1", "-o", output)
    assert outcome.code == code, outcome.err
    assert [row.schedule for row in rows(output)] == ["sequential", "per-layer"]
    assert all(schedule in outcome.out for schedule in ("sequential", "per-layer"))


@pytest.mark.parametrize(
    ("arguments", "step"),
    [
        (("--schedule", "twice"), "load_quietly"),
        (("--sweep-dtype", "float8"), "load_quietly"),
        (("--retain-ratio", "2"), "load_quietly"),
        (("--num-layers", "9"), "token_batches"),
    ],
)
def test_bad_arguments_are_refused_before_the_work(
    run: RunMain, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], step: str
) -> None:
    def refuse(*_: object, **__: object) -> object:
        raise AssertionError(f"{step} is too late")

    monkeypatch.setattr(bench_compress, step, refuse)
    outcome = run(*arguments)
    assert outcome.code == 2, outcome.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "1,3"), "the model has decoder layers 0..2, got layers [1, 3]"),
        (
            ("--schedule", "twice"),
            "per-layer, single-sweep, progressive, got 'twice'",
        ),
        (("--seq-len", "500"), "500 tokens, the model has 128 positions"),
        (
            ("--batch-size", "4"),
            "--num-samples must be a multiple of --batch-size, and at least twice",
        ),
        (("--num-layers", "9"), "the model has 3 decoder layers, got --num-layers 9"),
    ],
)
def test_bad_arguments_are_one_clear_line(run: RunMain, arguments: tuple[str, ...], message: str) -> None:
    outcome = run("--num-layers", "2", *arguments)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err.splitlines()[-1].startswith("error: ")
    assert message in outcome.err
