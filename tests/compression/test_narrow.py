from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.compression import held_out, memory, narrow
from grasp.config import GraspConfig
from grasp.errors import CostTableError
from grasp.method import channels
from grasp.method.cost_table import CostTable, LinearSeconds
from grasp.method.svd import Projected
from grasp.model.batch import as_batches
from grasp.model.dense import dense_shape
from grasp.model.narrowing import GATE_UP, narrowed_shapes, narrowest_shapes
from grasp.model.quantized_linear import QUANTIZED
from grasp.model.size import model_size
from grasp.model.targets import Target, all_targets
from grasp.statistics import scores
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.loss import mean_loss
from tests.candidates import is_narrowed, losing
from tests.interrupted import assert_same, run, stopped
from tests.lowrank_models import logits
from tests.tiny_models import tiny_batches, tiny_model

pytestmark = pytest.mark.long

BEST = GraspConfig.best(compression_ratio=0.15)
CHANNELS = 96


@pytest.fixture(autouse=True)
def small_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MULTIPLE", 8)


def model_with_quiet_channels(
    family: str = "llama", channels: int = CHANNELS, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model in whose layers 1 and 2 half of the channels of the MLP hardly reach the output."""
    model = tiny_model(family, dtype, intermediate_size=channels)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-3
    return model


def test_projected_output_covariances_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[bool] = []

    def gather(*args: Any, **options: Any) -> dict[Target, Covariance]:
        found = gather_covariances(*args, **options)
        gathered.extend(isinstance(covariance.B, Projected) for covariance in found.values())
        return found

    def compressed() -> tuple[PreTrainedModel, CompressionReport]:
        model = model_with_quiet_channels(dtype=torch.float64, channels=128)
        return model, compress_(model, tiny_batches(4, length=32), BEST)

    monkeypatch.setattr(scores, "gather_covariances", gather)
    got, report = compressed()
    assert sum(gathered) >= 3 * len(GATE_UP)  # of three layers, narrowed ones are less wide
    gathered.clear()
    monkeypatch.setattr(memory, "is_projected_cheaper", lambda shape: False)
    expected, whole = compressed()
    assert not any(gathered)
    assert report.channels == whole.channels
    assert {m.name: m.rank for m in report.modules} == {m.name: m.rank for m in whole.modules}
    torch.testing.assert_close(logits(got), logits(expected), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_quiet_channels_go_and_the_budget_is_met(family: str, tmp_path: Path) -> None:
    model = model_with_quiet_channels(family)
    before = model_size(model).parameters
    report = compress_(model, tiny_batches(4, length=32), BEST)
    shapes = narrowed_shapes(model)
    widths = {int(path.split(".")[2]): n for path, (n, _) in shapes.items() if path.endswith("up_proj")}
    assert widths.keys() == {1, 2}
    assert all(CHANNELS // 2 <= width < CHANNELS for width in widths.values())
    removed = 1 - model_size(model).parameters / before
    assert 0.15 <= removed < 0.16
    assert report.after.parameters == model_size(model).parameters
    assert {path: width for path, (_, width) in report.channels.items()} == {
        f"model.layers.{layer}.mlp": width for layer, width in widths.items()
    }
    assert CompressionReport.from_json(report.to_json()) == report
    assert report.channels_text.endswith("of the channels of 2 MLPs removed")
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_bytes_are_met_too() -> None:
    model = model_with_quiet_channels()
    target = int(0.8 * model_size(model).bytes)
    compress_(model, tiny_batches(4, length=32), GraspConfig.best(target_bytes=target))
    assert narrowed_shapes(model)
    assert 0.97 * target <= model_size(model).bytes <= target


def modules_of(model: PreTrainedModel) -> dict[str, Any]:
    """The linears of the decoder layers, by path."""
    return {target.name: target.module for target in all_targets(model)}


def costs_of(model: PreTrainedModel) -> CostTable:
    """A table in which a linear costs as much as it has numbers."""
    linears: dict[Any, LinearSeconds] = {}
    for n, k in [*map(dense_shape, modules_of(model).values()), *narrowest_shapes(model)]:
        ranks = tuple(range(1, min(n, k) + 1))
        linears[(n, k), None] = LinearSeconds(n * k, ranks, tuple(r * (n + k - r) for r in ranks))
    return CostTable("any", "measured", "float32", linears, layer=50.0, rest=1000.0, form="pivoted")


def test_seconds_are_met_too() -> None:
    model = model_with_quiet_channels()
    costs = costs_of(model)
    before = sum(linear.weight.numel() for linear in modules_of(model).values())
    report = compress_(model, tiny_batches(4, length=32), GraspConfig.best(target_latency=0.85), costs=costs)
    assert narrowed_shapes(model)
    after = before - (report.before.parameters - report.after.parameters)
    assert report.decode_seconds == {"dense": 1150 + before, "after": pytest.approx(1150 + after)}
    assert 0.8 < report.decode_seconds["after"] / report.decode_seconds["dense"] <= 0.85


def test_costs_without_the_narrowest_shapes_are_refused_at_once() -> None:
    model = model_with_quiet_channels()
    costs = costs_of(model)
    whole = {(shape, None): costs.linears[shape, None] for shape in map(dense_shape, modules_of(model).values())}
    with pytest.raises(CostTableError, match=r"no linear of 32 inputs and 48 outputs"):
        compress_(model, tiny_batches(1), BEST, costs=dataclasses.replace(costs, linears=whole))


def test_the_weights_of_narrowed_linears_are_freed() -> None:
    model = model_with_quiet_channels()
    linears = modules_of(model)
    compress_(model, tiny_batches(4, length=32), BEST)
    assert narrowed_shapes(model)
    assert all(linears[name].weight.is_meta for name in narrowed_shapes(model))


@pytest.mark.parametrize("bits", [8, 4])
def test_what_is_left_is_quantised(bits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channels, "MULTIPLE", 64)
    model = tiny_model("llama", hidden_size=64, intermediate_size=256)
    with torch.no_grad():
        for layer in model.model.layers[1:]:
            layer.mlp.down_proj.weight[:, ::2] *= 1e-3
    compress_(model, tiny_batches(4, length=64), GraspConfig.best(compression_ratio=0.15, bits=bits))
    assert narrowed_shapes(model)
    assert all(isinstance(model.get_submodule(name), QUANTIZED) for name in narrowed_shapes(model))
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


def test_the_dense_loss_is_that_of_the_whole_model() -> None:
    model = model_with_quiet_channels()
    others = tiny_batches(1, length=32, seed=5)
    expected = mean_loss(model, as_batches(others))
    report = compress_(model, tiny_batches(4, length=32), BEST, held_out=others)
    assert "narrowed, low-rank" in report.held_out_loss
    assert report.held_out_loss["dense"] == pytest.approx(expected, rel=1e-6)


def test_without_a_gain_nothing_is_narrowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(narrow, "LEAST_GAIN", 1.0)
    model = model_with_quiet_channels()
    compress_(model, tiny_batches(4, length=32), BEST)
    assert not narrowed_shapes(model)


def test_layers_removed_from_the_whole_model_can_win(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where every narrowed candidate is bad, the channels come back."""
    model = model_with_quiet_channels()
    monkeypatch.setattr(held_out, "_measured", losing(is_narrowed))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given = tiny_batches(4, length=32), BEST
    report = compress_(model, *given, held_out=tiny_batches(1, length=32, seed=5), costs=costs_of(model))
    assert any(name.startswith("narrowed, low-rank") for name in report.held_out_loss)
    assert len(report.removed_layers) == 1
    assert not narrowed_shapes(model)
    (removed,) = report.removed_layers
    left = [value for name, value in before.items() if f".{removed}." not in name]
    assert all(torch.equal(*pair) for pair in zip(model.state_dict().values(), left, strict=True))
    for unit in (report.candidate_bytes, report.candidate_seconds):
        assert unit["compressed"] == pytest.approx(unit[f"layers {removed} removed"])
    layer = sum(value.numel() for name, value in before.items() if f".{removed}." in name and value.ndim == 2)
    seconds = report.decode_seconds
    assert seconds["dense"] - seconds["after"] == pytest.approx(layer + 50)
    assert report.candidate_seconds["dense"] == seconds["dense"]


def test_a_linear_map_of_the_whole_model_can_win(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the map that a run without channels fits."""
    monkeypatch.setattr(held_out, "_measured", losing(lambda option: not option.map and option.name != "dense"))
    results = []
    for least in (narrow.LEAST_GAIN, 1.0):
        monkeypatch.setattr(narrow, "LEAST_GAIN", least)
        model = model_with_quiet_channels()
        report = compress_(model, tiny_batches(4, length=32), BEST, held_out=tiny_batches(1, length=32, seed=5))
        results.append((report, model.state_dict()))
    (narrowed, state), (without, expected) = results
    assert any(name.startswith("narrowed") for name in narrowed.held_out_loss)
    assert not any(name.startswith("narrowed") for name in without.held_out_loss)
    assert narrowed.removed_layers == without.removed_layers
    assert not narrowed.channels
    assert state.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in state.items())


@pytest.mark.parametrize(("loss", "is_narrowed"), [(0.0, False), (1e9, True)])
def test_a_layer_that_is_better_removed_keeps_its_channels(
    loss: float, is_narrowed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    choose = narrow.choose_widths

    def noted(*given: Any) -> dict[str, list[int]]:
        found.append(choose(*given))
        return found[-1]

    monkeypatch.setattr(narrow, "choose_widths", noted)
    monkeypatch.setattr(narrow, "removal_losses", lambda run, plan: {1: loss})
    model, others = model_with_quiet_channels(), tiny_batches(1, length=32, seed=5)
    given = model, tiny_batches(4, length=32), GraspConfig.best(target_latency=0.65)
    compress_(*given, held_out=others, costs=costs_of(model))
    assert "model.layers.2.mlp" in found[0]
    assert ("model.layers.1.mlp" in found[0]) is is_narrowed


def test_layers_outside_of_the_scope_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer 0 does next to nothing, and is not to be touched."""
    model = model_with_quiet_channels()
    with torch.no_grad():
        for name in ("self_attn.o_proj", "mlp.down_proj"):
            model.model.layers[0].get_parameter(f"{name}.weight").mul_(1e-3)
    config = GraspConfig.best(layers=(1, 2), retain_ratio=0.3)
    monkeypatch.setattr(held_out, "_measured", losing(is_narrowed))
    report = compress_(model, tiny_batches(4, length=32), config, held_out=tiny_batches(1, length=32, seed=5))
    assert any(name.startswith("narrowed") for name in report.held_out_loss)
    assert report.removed_layers == (1, 2)


def test_a_narrowed_model_keeps_its_shapes_when_it_is_compressed_again(tmp_path: Path) -> None:
    model = model_with_quiet_channels()
    compress_(model, tiny_batches(4, length=32), BEST)
    before = narrowed_shapes(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    compress_(again, tiny_batches(4, length=32), GraspConfig.best(compression_ratio=0.05))
    assert before.items() <= narrowed_shapes(again).items()
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(again))


def test_the_report_leaves_out_channels_of_removed_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    decide = held_out.decision

    def without_layer_2(run: Any, chosen: Any, options: Any, losses: Any) -> Any:
        kept = {target: rank for target, rank in chosen.ranks.items() if target.layer != 2}
        return decide(run, chosen._replace(removed=(2,), ranks=kept), options, losses)

    monkeypatch.setattr(held_out, "decision", without_layer_2)
    model = model_with_quiet_channels()
    report = compress_(model, tiny_batches(4, length=32), BEST)
    assert report.removed_layers == (2,)
    assert report.channels.keys() == {"model.layers.1.mlp"}


@pytest.mark.parametrize(
    ("step", "count"),
    [("decompositions", 5), ("candidates, compared", 1), ("refit", 1)],
    ids=["first sweep", "candidates", "carrying out"],
)
def test_an_interrupted_run_narrows_as_if_it_had_not_been(
    step: str, count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(narrow, "LEAST_GAIN", -1.0)
    options: dict[str, Any] = {"held_out": tiny_batches(1, length=32, seed=5), "intermediate_size": CHANNELS}
    expected = run(None, BEST, **options)
    assert "narrowed, low-rank" in expected[0].held_out_loss
    stopped(tmp_path / "out.partial", step, count, BEST, **options)
    assert_same(run(tmp_path / "out.partial", BEST, **options), expected)
