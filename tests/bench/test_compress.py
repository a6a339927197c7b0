from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from grasp.attribution import DenseSum, FactoredSum
from grasp.bench import compress as bench_compress
from grasp.bench import conditions
from grasp.bench.compress import main
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tiny model, and conditions that cost nothing to measure."""
    tiny = lambda name, dtype: (tiny_model("llama", vocab_size=300), byte_tokenizer())  # noqa: E731
    monkeypatch.setattr(bench_compress, "load_model", tiny)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    sizes = ("--retain-ratio", "0.4", "--num-samples", "4", "--seq-len", "16", "--timed-batches", "2", "--threads", "1")
    return CliRunner().invoke(app, ["tiny", *sizes, *arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_schedule_is_measured_and_chooses_what_the_formulas_choose(tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    result = run("--num-layers", "2", "-o", str(output))
    assert result.exit_code == 0, result.output
    rows = {row["schedule"]: row for row in lines(output)}
    assert list(rows) == ["sequential", "per-layer", "single-sweep"]
    for row in rows.values():
        assert row["groups"] > 0
        assert row["largest_gap"] <= 1e-3
        assert row["extrapolated"]
        assert row["timed_sequences"] == 2
        assert 0 < row["seconds_prefix"] + row["seconds_contraction"] < row["seconds"]
        assert row["speedup"] == pytest.approx(row["yardstick_seconds"] / row["seconds"])
        assert row["share_of_predicted"] == pytest.approx(row["speedup"] / row["predicted_speedup"])
        assert row["yardstick_seconds"] == rows["sequential"]["naive_seconds"]
        assert row["conditions"]["threads"] == 1
    assert 1 < rows["sequential"]["predicted_speedup"] < rows["per-layer"]["predicted_speedup"]
    assert rows["per-layer"]["predicted_speedup"] < rows["single-sweep"]["predicted_speedup"]
    assert "extrapolated" in result.output


def test_the_whole_set_is_extrapolated_from_nothing(tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    result = run("--layers", "1", "--schedule", "sequential", "--full", "-o", str(output))
    assert result.exit_code == 0, result.output
    (row,) = lines(output)
    assert not row["extrapolated"]
    assert row["timed_sequences"] == row["sequences"] == 4
    assert "extrapolated" not in result.output


def test_sweeps_in_bfloat16_are_judged_by_perplexity(tmp_path: Path) -> None:
    output = tmp_path / "compress.jsonl"
    arguments = ("--layers", "1", "--schedule", "single-sweep", "--sweep-dtype", "bfloat16", "--batch-size", "2")
    result = run(*arguments, "-o", str(output))
    assert result.exit_code == 0, result.output
    yardstick, row = lines(output)
    assert (yardstick["schedule"], yardstick["sweep_dtype"], yardstick["batch_size"]) == ("sequential", None, 1)
    assert yardstick["perplexity"] is None
    assert (row["sweep_dtype"], row["batch_size"], row["timed_sequences"]) == ("bfloat16", 2, 4)
    assert row["share_of_predicted"] is None
    assert row["perplexity"] == pytest.approx(row["perplexity_fp32"], rel=0.1)


def test_a_wrong_selection_is_not_reported(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for kind in (DenseSum, FactoredSum):
        result = kind.result
        monkeypatch.setattr(kind, "result", lambda self, result=result: (result(self)[0], result(self)[1].flip(0)))
    answer = run("--layers", "1", "-o", str(tmp_path / "compress.jsonl"))
    assert answer.exit_code == 1
    assert "nothing is reported" in " ".join(answer.output.split())
    assert not (tmp_path / "compress.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--layers", "1,3"), "the model has decoder layers 0..2, got --layers 1,3"),
        (("--schedule", "twice"), "schedule must be one of sequential, per-layer, single-sweep, got 'twice'"),
        (("--seq-len", "500"), "500 tokens, the model has 128 positions"),
    ],
)
def test_bad_arguments_are_one_clear_message(arguments: tuple[str, ...], message: str) -> None:
    result = run("--num-layers", "2", *arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
