from __future__ import annotations

import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Conv1D, PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.compress import compress_
from grasp.compression import rounds
from grasp.compression.budget import Plan, find_prices
from grasp.compression.candidates import FIRST_SHARE, candidates
from grasp.compression.quantize import quantize_
from grasp.compression.selection import Selection
from grasp.config import GraspConfig
from grasp.errors import CostTableError
from grasp.method.cost_table import CostTable, LinearSeconds, from_roofline
from grasp.method.ranks import break_even_rank
from grasp.method.storage import Storage
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.quantized_linear import QUANTIZED, QuantizedLowRankLinear
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder, layer_targets
from grasp.statistics import scores as scoring
from grasp.statistics.sweep import Prefix
from grasp_kernels.roofline import CARDS
from tests.tiny_models import tiny_batches, tiny_model

BEST: dict[str, Any] = {"basis": "kfac", "metric": "magnitude", "allocation": "global", "schedule": "single-sweep"}


def removed(report: CompressionReport) -> int:
    return report.before.parameters - report.after.parameters


@pytest.mark.parametrize("scope", ["redundant", "model"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen2"])
def test_a_global_budget_removes_what_the_uniform_one_removes(family: str, scope: str) -> None:
    batches = tiny_batches(2)
    uniform = compress_(tiny_model(family), batches, GraspConfig(layers=(0, 2), retain_ratio=0.4))
    model = tiny_model(family)
    report = compress_(model, batches, GraspConfig(layers=(0, 2), retain_ratio=0.4, scope=scope, **BEST))
    largest_step = max(sum(target.module.weight.shape) for target in layer_targets(tiny_model(family), 0)[0])
    assert removed(uniform) <= removed(report) < removed(uniform) + largest_step
    layers = {module.layer for module in report.compressed}
    assert layers <= ({0, 2} if scope == "redundant" else {0, 1, 2})
    assert all(module.reason == "stays dense: the budget does more elsewhere" for module in report.left)
    with torch.no_grad():
        assert torch.isfinite(model(batches[0]).logits).all()


def test_a_matrix_on_which_the_loss_depends_most_stays_dense() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        for target in layer_targets(model, 1)[0]:
            target.module.weight.mul_(20 if target.name.endswith("down_proj") else 0.05)
    report = compress_(model, tiny_batches(16), GraspConfig(layers=(1,), retain_ratio=0.6, **BEST))
    assert "model.layers.1.mlp.down_proj" in {module.name for module in report.left}


def test_the_whole_model_uniformly() -> None:
    model = tiny_model("llama")
    report = compress_(model, tiny_batches(1), GraspConfig(compression_ratio=0.3, scope="model"))
    assert report.compression_ratio == pytest.approx(0.3, abs=0.01)
    assert {module.layer for module in report.compressed} == {0, 1, 2}
    shares = {module.parameters_after / module.parameters_before for module in report.compressed}
    assert max(shares) - min(shares) < 0.12  # whole ranks of small matrices


def test_refit_changes_left_factors_alone() -> None:
    plain, refitted = tiny_model("llama"), tiny_model("llama")
    for model, refit in ((plain, False), (refitted, True)):
        compress_(model, tiny_batches(4), GraspConfig(layers=(0, 2), retain_ratio=0.4, refit=refit, **BEST))
    for name, module in plain.named_modules():
        if isinstance(module, LowRankLinear):
            other = refitted.get_submodule(name)
            assert torch.equal(module.Vh, other.Vh)
            assert not torch.equal(module.U, other.U)


@pytest.mark.parametrize(
    ("family", "basis", "metric"),
    [("llama", "kfac", "magnitude"), ("gpt2", "kfac", "magnitude"), ("llama", "whitened", "fisher")],
)
def test_a_progressive_schedule_takes_statistics_again_with_a_part_of_the_budget_spent(
    family: str, basis: str, metric: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, Tensor]] = []
    seen_by_moments: list[dict[str, Tensor]] = []

    def watched(gather: Callable[..., Any], into: list[dict[str, Tensor]]) -> Callable[..., Any]:
        def run(prefix: Prefix, targets: Collection[Target], **options: Any) -> Any:
            modules = {target.name: prefix.model.get_submodule(target.name) for target in targets}
            into.append(
                {
                    name: module.dense_weight() if isinstance(module, LowRankLinear) else dense_weight(module).clone()
                    for name, module in modules.items()
                }
            )
            return gather(prefix, targets, **options)

        return run

    monkeypatch.setattr(scoring, "gather_covariances", watched(scoring.gather_covariances, seen))
    monkeypatch.setattr(scoring, "basis_moments", watched(scoring.basis_moments, seen_by_moments))
    model, dense = tiny_model(family), tiny_model(family)
    settings = {**BEST, "basis": basis, "metric": metric, "schedule": "progressive"}
    config = GraspConfig(compression_ratio=0.2, **settings, scope="model")
    report = compress_(model, tiny_batches(4), config)
    assert report.compression_ratio == pytest.approx(0.2, abs=0.01)
    once = compress_(tiny_model(family), tiny_batches(4), replace(config, schedule="single-sweep"))
    assert [module.rank for module in once.modules] != [module.rank for module in report.modules]

    first, second = seen[0], seen[1]
    for name, weight in (seen_by_moments[1] if metric == "fisher" else {}).items():
        assert torch.equal(weight, second[name])
    assert all(torch.equal(weight, dense_weight(dense.get_submodule(name))) for name, weight in first.items())
    saved = 0
    for name, weight in second.items():
        if not torch.equal(weight, first[name]):
            rank = int(torch.linalg.matrix_rank(weight.double(), rtol=1e-5))
            saved += weight.numel() - rank * sum(weight.shape)
    assert saved == pytest.approx(FIRST_SHARE * 0.2 * report.before.parameters, rel=0.1)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):
            assert torch.equal(module.weight, dense.get_submodule(name).weight)


def test_sums_are_gone_before_new_ones_are_gathered_and_before_refit(monkeypatch: pytest.MonkeyPatch) -> None:
    sums: list[weakref.ref[Tensor]] = []

    def forgotten(then: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            assert all(each() is None for each in sums)
            result = then(*arguments, **options)
            found = result.values() if isinstance(result, dict) else ()
            sums.extend(weakref.ref(each) for covariance in found for each in (covariance.A, covariance.B))
            return result

        return run

    monkeypatch.setattr(scoring, "gather_covariances", forgotten(scoring.gather_covariances))
    monkeypatch.setattr(rounds, "Refit", forgotten(rounds.Refit))
    compress_(tiny_model("llama"), tiny_batches(4), GraspConfig.best(compression_ratio=0.2))
    assert sums


@pytest.mark.parametrize("basis", ["whitened", "kfac"])
@pytest.mark.parametrize("schedule", ["sequential", "per-layer", "single-sweep"])
def test_every_schedule_works_in_every_basis(basis: str, schedule: str) -> None:
    config = GraspConfig(layers=(0, 2), retain_ratio=0.4, basis=basis, metric="fisher", schedule=schedule)
    report = compress_(tiny_model("llama"), tiny_batches(2), config)
    assert len(report.compressed) == 14


FLOATING: dict[Storage | None, float] = {None: 1.0}


def shapes_of(model: PreTrainedModel) -> list[tuple[int, int]]:
    layers = range(len(decoder(model).layers))
    return [dense_shape(target.module) for layer in layers for target in layer_targets(model, layer)[0]]


def costs_of(
    model: PreTrainedModel, *, dear: tuple[int, int] | None = None, speeds: Mapping[Storage | None, float] = FLOATING
) -> CostTable:
    """Seconds as a tenth of the parameters, over the speed; linears of one shape may be ten times as dear."""

    def linear(n: int, k: int, speed: float) -> LinearSeconds:
        unit = (1.0 if (n, k) == dear else 0.1) / speed
        top = n * k // (n + k)
        return LinearSeconds(unit * n * k, (0, top), (0.0, unit * top * (n + k)))

    linears = {
        (shape, storage): linear(*shape, speed) for shape in shapes_of(model) for storage, speed in speeds.items()
    }
    return CostTable("any", "measured", "float32", linears, 0.0, 100.0, layer_quantized=0.0, rest_quantized=60.0)


def predicted(costs: CostTable, model: PreTrainedModel, report: CompressionReport) -> float:
    ranks = {module.name: module.rank for module in report.compressed}
    layers = range(len(decoder(model).layers))
    targets = [target for layer in layers for target in layer_targets(tiny_model("llama"), layer)[0]]
    storages = {name: getattr(module, "storage", None) for name, module in model.named_modules()}
    linears = [(dense_shape(t.module), ranks.get(t.name), storages[t.name]) for t in targets]
    total = costs.predict(linears, len(layers), quantized=report.config["bits"] is not None)
    assert report.decode_seconds["after"] == pytest.approx(total)
    return total


@pytest.mark.parametrize(
    ("target", "config"),
    [
        (0.8, {"scope": "redundant"}),
        (0.8, {"scope": "model"}),
        (0.4, {"scope": "model", "bits": 8}),
        (0.4, {"scope": "redundant", "bits": 8, "bits_dense": 4}),
    ],
)
def test_a_latency_is_met_and_all_of_it_is_used(target: float, config: dict[str, Any]) -> None:
    model = tiny_model("llama")
    costs = costs_of(model, speeds={None: 1, Storage(8): 2, Storage(4, 64): 1.8})
    dense = costs.predict(((shape, None) for shape in shapes_of(model)), 3)
    report = compress_(model, tiny_batches(8), GraspConfig(target_latency=target, **{**BEST, **config}), costs=costs)
    used = predicted(costs, model, report)
    assert report.compressed
    assert target * dense - 0.1 * (32 + 48) * 16 < used <= target * dense + 1e-6


def test_every_candidate_keeps_to_the_latency_and_has_its_predicted_time() -> None:
    model = tiny_model("llama")
    config, batches = GraspConfig(target_latency=0.7, scope="model", **BEST), tiny_batches(5)
    report = compress_(model, batches[:4], config, costs=costs_of(model), held_out=batches[4:])
    seconds = dict(report.candidate_seconds)
    assert seconds.keys() == report.held_out_loss.keys()
    assert len(seconds) > 3
    dense = seconds.pop("dense")
    assert {"dense": dense, "after": seconds["compressed"]} == report.decode_seconds
    assert all(0 < time <= 0.7 * dense + 1e-6 for time in seconds.values())


@pytest.mark.parametrize("int4", [3.0, 1.5])
def test_dense_linears_get_fewer_bits_where_that_is_faster(int4: float) -> None:
    model = tiny_model("llama", hidden_size=64, intermediate_size=128)
    costs = costs_of(model, speeds={None: 1, Storage(8): 2, Storage(4, 64): int4})
    config = GraspConfig(target_latency=0.42, bits="auto", scope="model", **BEST)
    report = compress_(model, tiny_batches(4), config, costs=costs)
    modules = [m for m in decoder(model).layers.modules() if isinstance(m, QUANTIZED)]
    assert ({Storage(4, 64)} <= {module.storage for module in modules}) == (int4 > 2)
    assert any(isinstance(module, QuantizedLowRankLinear) for module in modules) == (int4 < 2)
    assert report.decode_seconds["after"] <= 0.42 * report.decode_seconds["dense"] + 1e-6


def test_latency_is_spent_where_it_is_cheap() -> None:
    """Where gate and up take ten times as long per parameter, the budget comes from them, and others keep more."""
    lost = {}
    for dear in (None, (48, 32)):
        model = tiny_model("llama")
        config = GraspConfig(target_latency=0.7, scope="model", **BEST)
        report = compress_(model, tiny_batches(4), config, costs=costs_of(model, dear=dear))
        others = [m for m in report.compressed if "gate" not in m.name and "up" not in m.name]
        lost[dear] = sum(1 - m.parameters_after / m.parameters_before for m in others)
    assert lost[48, 32] < lost[None]


def test_a_linear_that_low_rank_makes_no_faster_stays_dense() -> None:
    model = tiny_model("llama")
    costs = costs_of(model)
    slow = {((16, 32), None): LinearSeconds(1.0, (1,), (2.0,))}  # keys and values
    costs = dataclasses.replace(costs, linears={**costs.linears, **slow})
    report = compress_(model, tiny_batches(2), GraspConfig(target_latency=0.6, scope="model", **BEST), costs=costs)
    assert not [module.name for module in report.compressed if module.out_features == 16]


@pytest.mark.parametrize("config", [{}, {"allocation": "uniform"}, {"scope": "model"}])
def test_bytes_are_met_whatever_the_dtype(config: dict[str, Any]) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        model = tiny_model("llama", dtype)
        size = sum(p.nbytes for p in model.parameters())
        report = compress_(model, tiny_batches(2), GraspConfig(target_bytes=int(0.75 * size), **{**BEST, **config}))
        assert 0.75 * size - 80 * 16 * dtype.itemsize < report.after.bytes <= 0.75 * size


@pytest.mark.parametrize(
    ("family", "config"),
    [("llama", {}), ("qwen2", {"bits_dense": 4}), ("gpt2", {"bits": 4}), ("llama", {"form": "pivoted"})],
)
def test_bytes_are_those_of_the_quantised_model(family: str, config: dict[str, Any]) -> None:
    dense = tiny_model(family, torch.bfloat16)
    quantize_(dense, lambda module: GraspConfig(**{"bits": 8, **config}).dense_storage or Storage(8))
    size = model_size(dense).bytes
    config = {"bits": 8, "scope": "model", "refit": True, **BEST, **config}
    model = tiny_model(family, torch.bfloat16)
    report = compress_(model, tiny_batches(2), GraspConfig(target_bytes=int(0.85 * size), **config))
    assert report.after == model_size(model)
    assert 0.85 * size - 80 * 16 < report.after.bytes <= 0.85 * size
    low = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLowRankLinear)}
    assert {module.name: module.bytes_after for module in report.compressed} == {
        name: sum(p.nbytes for p in module.parameters()) + (0 if module.order is None else module.order.nbytes)
        for name, module in low.items()
    }
    assert {module.storage for module in low.values()} == {Storage(8)} if config["bits"] == 8 else {Storage(4, 64)}
    assert not any(isinstance(module, (LowRankLinear, nn.Linear, Conv1D)) for module in model.modules())


def test_bits_of_an_offloaded_model_are_refused_before_anything_is_done() -> None:
    model = cpu_offload(tiny_model("llama"), torch.device("cpu"))
    with pytest.raises(ValueError, match=r"bits=8 needs all weights .* with `grasp quantize`"):
        compress_(model, tiny_batches(2), GraspConfig.best(compression_ratio=0.1, bits=8))


def test_dense_linears_get_fewer_bits_where_that_costs_less() -> None:
    def quantised(target_bytes: int) -> tuple[set[str], CompressionReport, Counter[str]]:
        model, steps = tiny_model("llama", hidden_size=64, intermediate_size=128), Counter[str]()
        report = compress_(
            *(model, tiny_batches(4), GraspConfig.best(target_bytes=target_bytes, bits="auto")),
            held_out=tiny_batches(1),
            progress=lambda step, done, total: steps.update([step.partition(",")[0]] if done == total else []),
        )
        modules = decoder(model).layers.modules()
        return {f"{type(m).__name__} {m.storage}" for m in modules if isinstance(m, QUANTIZED)}, report, steps

    found, met, _ = quantised(10**9)
    assert found == {"QuantizedLinear int8"}
    found, report, steps = quantised(int(0.9 * (size := met.after.bytes)))
    assert found == {"QuantizedLinear int4/64", "QuantizedLinear int8"}
    assert 0.85 * size < report.after.bytes <= 0.9 * size
    assert {module.reason for module in report.left} == {"stays dense, in int4/64", "stays dense, in int8"}
    assert report.held_out_loss.keys() == {"dense", "compressed"}
    assert (steps["covariances"], steps["candidates"]) == (1, 0)
    found, report, steps = quantised(int(0.4 * size))
    assert "QuantizedLowRankLinear int8" in found
    assert steps["covariances"] == 2 < len(report.held_out_loss)


def test_a_target_that_is_already_met_changes_nothing() -> None:
    model = tiny_model("llama")
    report = compress_(model, tiny_batches(2), GraspConfig(target_bytes=10**9, **BEST))
    assert not report.compressed
    assert report.after == report.before
    costs = costs_of(model)
    config = GraspConfig(target_latency=1.0, scope="model", **BEST)
    assert not compress_(tiny_model("llama"), tiny_batches(2), config, costs=costs).compressed
    config = replace(config, bits=8, target_latency=0.5)
    costs = costs_of(model, speeds={None: 1, Storage(8): 2.5})
    steps: set[str] = set()
    report = compress_(model, tiny_batches(2), config, costs=costs, progress=lambda step, *_: steps.add(step))
    assert not report.modules
    assert not {step for step in steps if step.startswith(("sums", "decompositions"))}
    assert report.decode_seconds["after"] < 0.5 * report.decode_seconds["dense"]


def test_targets_out_of_reach_say_what_is_within_it() -> None:
    model = tiny_model("llama")
    costs, stored = costs_of(model), costs_of(model, speeds={None: 1, Storage(8): 2, Storage(4, 64): 1e6})
    shapes = shapes_of(model)
    targets = {layer: layer_targets(model, layer)[0] for layer in range(3)}
    with pytest.raises(
        ValueError, match=r"target_bytes=1000 cannot be reached: rank 1 .* gives target_bytes=\d+$"
    ) as caught:
        find_prices(GraspConfig(target_bytes=1000), model, targets)
    least = int(str(caught.value).rpartition("=")[2])
    report = compress_(model, tiny_batches(1), GraspConfig(target_bytes=least, scope="model", **BEST))
    assert report.after.bytes == least
    with pytest.raises(ValueError, match=r"target_latency=0.010 cannot be reached: .* gives target_latency=0\.\d+$"):
        find_prices(GraspConfig(target_latency=0.01, **BEST), model, targets, costs)
    share = stored.rest_quantized / stored.predict(((shape, None) for shape in shapes), 3)
    message = f"rank 1 or int4/64 in every eligible matrix gives target_latency={share:.3f}"
    with pytest.raises(ValueError, match=message):
        find_prices(GraspConfig(target_latency=0.001, bits="auto", **BEST), model, targets, stored)


def test_a_latency_needs_costs_of_this_model() -> None:
    model = tiny_model("llama")
    config = GraspConfig(target_latency=0.8, **BEST)
    with pytest.raises(ValueError, match="target_latency needs costs"):
        compress_(model, tiny_batches(1), config)
    with pytest.raises(CostTableError, match="are for bfloat16 weights, the model has float32"):
        compress_(model, tiny_batches(1), config, costs=dataclasses.replace(costs_of(model), dtype="bfloat16"))
    with pytest.raises(CostTableError, match=r"no linear of "):
        compress_(model, tiny_batches(1), config, costs=costs_of(tiny_model("gpt2")))
    with pytest.raises(CostTableError, match=r"no int8 linears, only float32\. .* --bits 8 -o"):
        compress_(model, tiny_batches(1), replace(config, bits=8), costs=costs_of(model))


def test_the_costs_of_a_card_will_do() -> None:
    model = tiny_model("llama")
    costs = from_roofline(CARDS["H100"], shapes_of(model), dtype="float32", form="factored", itemsize=4, head=(64, 32))
    with pytest.raises(ValueError, match=r"target_latency=0.900 cannot be reached"):  # tiny linears are all launches
        compress_(model, tiny_batches(1), GraspConfig(target_latency=0.9, **BEST), costs=costs)


def remove(share: float, **options: Any) -> tuple[PreTrainedModel, CompressionReport]:
    model = tiny_model("llama", num_hidden_layers=5)
    with torch.no_grad():  # two layers that do next to nothing
        for layer in (1, 3):
            decoder(model).layers[layer].self_attn.o_proj.weight.mul_(1e-2)
            decoder(model).layers[layer].mlp.down_proj.weight.mul_(1e-2)
    config = GraspConfig(compression_ratio=share, scope="model", **BEST, **options)
    *batches, held_out = tiny_batches(8)
    return model, compress_(model, batches, config, held_out=[held_out])


def test_layers_go_where_that_loses_less_and_the_rest_reloads_in_plain_transformers(tmp_path: Path) -> None:
    model, report = remove(0.45, refit=True)
    assert report.removed_layers
    assert set(report.removed_layers) <= {1, 3}
    left = 5 - len(report.removed_layers)
    assert len(decoder(model).layers) == model.config.num_hidden_layers == left
    assert not {module.layer for module in report.compressed} & set(report.removed_layers)
    assert {m.layer for m in report.left if m.reason == "its layer is removed"} == set(report.removed_layers)
    name = f"low-rank without layers {', '.join(map(str, report.removed_layers))}"
    candidates = {name: loss for name, loss in report.held_out_loss.items() if name not in ("dense", "compressed")}
    assert candidates[name] == min(candidates.values())
    assert report.compression_ratio == pytest.approx(0.45, abs=0.02)
    assert CompressionReport.from_json(report.to_json()) == report
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert any(isinstance(module, LowRankLinear) for module in again.modules())
    batch = tiny_batches(1)[0]
    with torch.no_grad():
        output = again(batch, use_cache=True)
        torch.testing.assert_close(output.logits, model(batch).logits)
    assert len(output.past_key_values.layers) == left


def test_layers_go_by_what_their_removal_loses() -> None:
    model = tiny_model("llama")
    targets = {layer: layer_targets(model, layer)[0] for layer in range(3)}
    config = GraspConfig(compression_ratio=0.3, scope="model", **BEST)
    prices, empty = find_prices(config, model, targets), torch.empty(0)
    selections = {
        target: Selection("", torch.arange(rank), torch.ones(min(dense_shape(target.module))), empty, empty, "")
        for target in itertools.chain(*targets.values())
        if (rank := break_even_rank(dense_shape(target.module), "factored"))
    }
    plan = Plan(0.5, (0, 1, 2), {target: len(selection.indices) // 2 for target, selection in selections.items()})

    def names(removal: dict[int, float]) -> list[str]:
        return list(candidates(selections, plan, prices, removal, nats=0.5))

    assert names({0: 1e9, 1: 1e9}) == ["low-rank"]
    assert names({0: 1e9, 1: 1e-9}) == ["low-rank without layers 1"]  # even at a million times as much
    assert names({0: 1e9, 1: 10.0}) == ["low-rank without layers 1", "low-rank"]
    assert names({}) == ["low-rank"]


@pytest.mark.parametrize("schedule", ["single-sweep", "progressive"])
def test_where_no_ranks_suffice_layers_go(schedule: str) -> None:
    model = tiny_model("llama")
    costs = dataclasses.replace(costs_of(model), layer=10_000.0)  # linears are a tenth of that
    config = dataclasses.replace(GraspConfig(target_latency=0.6, scope="model", **BEST), schedule=schedule)
    with pytest.raises(ValueError, match=r"target_latency=0.600 cannot be reached: rank 1 .* gives target_latency=0.9"):
        compress_(model, tiny_batches(8), config, costs=costs)
    report = compress_(model, tiny_batches(7), config, held_out=tiny_batches(1, seed=1), costs=costs)
    assert len(report.removed_layers) == 2
    assert len(decoder(model).layers) == 1
    assert report.decode_seconds["after"] <= 0.6 * report.decode_seconds["dense"]
