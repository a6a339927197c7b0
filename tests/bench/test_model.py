from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from torch import nn
from typer.testing import CliRunner, Result

from grasp.bench import conditions
from grasp.bench import model as bench_model
from grasp.bench.model import Unfused, difference, main, providers
from grasp.modules import LowRankLinear
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A tiny model, and conditions that cost nothing to measure."""
    monkeypatch.setattr(bench_model, "load_model", lambda name, dtype: (tiny_model("llama"), None))
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    sizes = ("--retain-ratio", "0.4", "--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "2", "--threads", "1")
    return CliRunner().invoke(app, ["tiny", *sizes, *arguments])


def test_every_provider_is_timed_and_written(tmp_path: Path) -> None:
    output = tmp_path / "model.jsonl"
    result = run("--num-layers", "1", "-o", str(output))
    assert result.exit_code == 0, result.output
    lines = {line["provider"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert list(lines) == ["dense", "removed", "compressed", "unfused"]
    for line in lines.values():
        assert line["layers"] == [1]
        assert line["prefill_tokens_per_s"] > 0
        assert line["decode_tokens_per_s"] > 0
        assert line["conditions"]["threads"] == 1
        assert "quality is not" in line["note"]
    assert lines["dense"]["decode_speedup_over_dense"] == lines["dense"]["prefill_speedup_over_dense"] == 1
    sizes = {name: line["weight_bytes"] for name, line in lines.items()}
    assert sizes["removed"] < sizes["compressed"] == sizes["unfused"] < sizes["dense"]
    assert "quality is not" in " ".join(result.output.split())
    assert result.output.count("× dense") == 2  # nothing of the table is cut off


def test_fused_and_unfused_models_agree_and_share_no_weights() -> None:
    models, left_out = providers(tiny_model("opt"), [0, 2], 0.4)
    assert left_out == {}
    assert 0 <= difference(models["compressed"], models["unfused"]) < 1e-5
    assert difference(models["compressed"], models["dense"]) > 1e-2
    kinds = {
        name: {type(m) for m in model.modules() if isinstance(m, (LowRankLinear, Unfused))}
        for name, model in models.items()
    }
    assert kinds == {"dense": set(), "removed": set(), "compressed": {LowRankLinear}, "unfused": {Unfused}}
    pointers = [{p.data_ptr() for p in model.parameters()} for model in models.values()]
    assert len(set.union(*pointers)) == sum(map(len, pointers))


def test_what_cannot_be_removed_is_left_out_with_the_reason() -> None:
    models, left_out = providers(tiny_model("llama"), [0, 1, 2], 0.4)
    assert "removed" not in models
    assert list(left_out) == ["removed"]


def test_wrong_logits_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def spoil(model: nn.Module) -> None:
        original(model)
        unfused = next(module for module in model.modules() if isinstance(module, Unfused))
        unfused[1].weight.data.neg_()

    original = bench_model.unfuse_
    monkeypatch.setattr(bench_model, "unfuse_", spoil)
    result = run("--num-layers", "1", "-o", str(tmp_path / "model.jsonl"))
    assert result.exit_code == 1
    assert "nothing was timed" in " ".join(result.output.split())
    assert not (tmp_path / "model.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-layers", "4"), "the model has 3 decoder layers, got --num-layers 4"),
        (("--layers", "1,3"), "the model has decoder layers 0..2, got --layers 1,3"),
        (("--layers", "one"), "--layers takes indices joined by commas, got 'one'"),
        (("--num-layers", "1", "--new-tokens", "500"), "more than the model's 128 positions"),
    ],
)
def test_bad_arguments_are_one_clear_message(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
