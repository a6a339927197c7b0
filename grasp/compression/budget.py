"""What may be compressed and how far: scopes, their budgets, and the choice within them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from grasp.method.cost_table import CostTable
from grasp.method.distances import least_changing_run
from grasp.method.knapsack import DENSE
from grasp.method.ranks import (
    Budget,
    break_even_rank,
    parameters_removed,
    rank_for_retain_ratio,
    redundant_layers,
    solve_compression_ratio,
    uniform_budget,
)
from grasp.method.schedules import BLOCKS
from grasp.model.dense import dense_shape
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder
from grasp.statistics.redundancy import Redundancy
from grasp_kernels.packing import RANK_MULTIPLE


class Units(NamedTuple):
    """What is redundant or not as a whole, numbered through all layers: a layer, or its attention and its MLP apart."""

    members: Mapping[int, Sequence[Target]]  # unit → its linears
    most_redundant: Callable[[int], Sequence[int]]  # so many units
    per_layer: int = 1


class Plan(NamedTuple):
    """Which linears may be compressed; the uniform ranks say how many parameters they may keep together."""

    retain_ratio: float
    layers: tuple[int, ...]  # ascending
    ranks: dict[Target, int]


@dataclass(frozen=True)
class Prices:
    """What a budget is counted in, and how much of it is to be saved."""

    linear: Callable[[Target, int], float]  # of a linear at a rank, or ``DENSE``
    layer: Callable[[int], float]  # of a decoder layer, all of it, as it is
    saving: float | None = None  # of the whole model; ``None``: as much as the uniform ranks of a plan save
    multiple: int = 1  # ranks in between cost the kernels as much, whose copies of the factors are padded

    def saved(self, target: Target, rank: int) -> float:
        """What a rank saves of a linear; negative where the linear is cheaper dense."""
        return self.linear(target, DENSE) - self.linear(target, rank)


def find_prices(
    config: GraspConfig, model: PreTrainedModel, targets: Mapping[int, Sequence[Target]], costs: CostTable | None = None
) -> Prices:
    """The prices in which a configuration states its target: seconds of decoding, bytes, or parameters.

    Raises:
        ValueError: if a latency is asked for without ``costs``, or nothing reaches the target.
        CostTableError: if ``costs`` are another model's.
    """
    layers = decoder(model).layers
    if config.target_latency is not None:
        if costs is None:
            raise ValueError(
                "target_latency needs costs: give compress_ a grasp.method.cost_table.CostTable, such as "
                "grasp.bench.costs.measure_costs(model)"
            )
        prices, total = _in_seconds(config.target_latency, model, targets, costs)
        _require_reachable(config, prices, targets, lambda saved: f"target_latency={1 - saved / total:.3f}")
        return prices
    if config.target_bytes is not None:
        size = model_size(model, layers).bytes
        weights = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
        prices = Prices(_bytes, weights.__getitem__, max(0, size - config.target_bytes), RANK_MULTIPLE)
        _require_reachable(config, prices, targets, lambda saved: f"target_bytes={size - saved:.0f}")
        return prices
    numbers = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    return Prices(parameters, numbers.__getitem__)


def parameters(target: Target, rank: int) -> int:
    """Of a linear at a rank, or ``DENSE``; its bias, which stays, left out."""
    n, k = dense_shape(target.module)
    return n * k if rank == DENSE else rank * (n + k)


def _bytes(target: Target, rank: int) -> int:
    return parameters(target, rank) * target.module.weight.element_size()


def _in_seconds(
    share: float, model: PreTrainedModel, targets: Mapping[int, Sequence[Target]], costs: CostTable
) -> tuple[Prices, float]:
    """The prices, and what the whole model takes as it is."""
    shapes = {layer: [dense_shape(target.module) for target in found] for layer, found in targets.items()}
    costs.require(set(chain.from_iterable(shapes.values())), str(model.dtype).removeprefix("torch."))
    total = costs.predict(((shape, None) for shape in chain.from_iterable(shapes.values())), len(shapes))

    def linear(target: Target, rank: int) -> float:
        return costs.linear(dense_shape(target.module), None if rank == DENSE else rank)

    def layer(index: int) -> float:
        return costs.layer + math.fsum(costs.linear(shape) for shape in shapes[index])

    return Prices(linear, layer, (1 - share) * total, RANK_MULTIPLE), total


def _require_reachable(
    config: GraspConfig,
    prices: Prices,
    targets: Mapping[int, Sequence[Target]],
    after: Callable[[float], str],
) -> None:
    """Raise unless the least ranks save enough, or all layers but one; ``after`` says what a saving leaves."""
    assert prices.saving is not None
    most = math.fsum(max(0.0, prices.saved(target, 1)) for target in chain.from_iterable(targets.values()))
    how = "rank 1 in every eligible matrix"
    if config.remove_layers:
        layers = [prices.layer(layer) for layer in targets]
        most, how = max(most, math.fsum(layers) - min(layers)), "removing all layers but one"
    if prices.saving > most:
        raise ValueError(f"{after(prices.saving)} cannot be reached: {how} gives {after(most)}")


def _layer_units(found: Redundancy, targets: Mapping[int, Sequence[Target]]) -> Units:
    return Units(targets, lambda count: redundant_layers(found.layers, count))


def _block_units(found: Redundancy, targets: Mapping[int, Sequence[Target]]) -> Units:
    by_block = {"attention": found.attention, "mlp": found.mlp}
    scores = [by_block[block][layer] for layer in range(len(found.layers)) for block in BLOCKS]
    if any(math.isnan(score) for score in scores):
        raise UnsupportedModelError(
            "attention and MLP cannot be told apart in every decoder layer of this model; take "
            "redundancy='block_influence', which judges whole layers"
        )
    members = {
        len(BLOCKS) * layer + place: [target for target in linears if target.block == block]
        for layer, linears in targets.items()
        for place, block in enumerate(BLOCKS)
    }
    return Units(members, lambda count: redundant_layers(scores, count), len(BLOCKS))


def _run_units(found: Redundancy, targets: Mapping[int, Sequence[Target]]) -> Units:
    return Units(targets, lambda count: least_changing_run(found.runs, count))


REDUNDANCIES: dict[str, Callable[[Redundancy, Mapping[int, Sequence[Target]]], Units]] = {
    "block_influence": _layer_units,
    "sub_block_influence": _block_units,
    "angular_distance": _run_units,
}


def choose_plans(
    config: GraspConfig,
    found: Redundancy,
    targets: Mapping[int, Sequence[Target]],
    total_parameters: int,
    prices: Prices,
) -> dict[str, Plan]:
    """A plan for each scope that is considered: the redundant layers, and the whole model where that is in question.

    Where parameters are counted, the second removes as many as the first.
    """
    units = REDUNDANCIES[config.redundancy](found, targets)
    plans = {"redundant": _plan(choose_budget(config, units, total_parameters, prices), units)}
    if config.scope != "redundant":
        shapes = {layer: [dense_shape(target.module) for target in linears] for layer, linears in targets.items()}
        if prices.saving is None:
            ranks = plans["redundant"].ranks
            removed = sum(parameters_removed(dense_shape(target.module), rank) for target, rank in ranks.items())
            # At a ratio of 1 no number of layers reaches the target: all of them share it.
            budget = solve_compression_ratio(shapes, tuple(shapes), total_parameters, removed / total_parameters, 1.0)
        else:
            budget = uniform_budget(shapes, tuple(shapes), config.retain_ratio)
        plans["model"] = _plan(budget, _layer_units(found, targets))
    return plans if config.scope == "auto" else {config.scope: plans[config.scope]}


def choose_budget(config: GraspConfig, units: Units, total_parameters: int, prices: Prices) -> Budget:
    """Which units are redundant, and the rank of each of their matrices.

    Where bytes or a latency are spent globally, the ranks are those of ``retain_ratio``, and tell how many units it
    takes.
    """
    shapes = {unit: [dense_shape(target.module) for target in linears] for unit, linears in units.members.items()}
    if config.layers is not None:
        return uniform_budget(shapes, config.layers, config.retain_ratio)
    if config.num_layers is not None:
        return uniform_budget(shapes, units.most_redundant(config.num_layers), config.retain_ratio)

    def saved(chosen: Sequence[int]) -> float:
        ranks = ((t, rank_for_retain_ratio(dense_shape(t.module), config.retain_ratio)) for t in linears_of(chosen))
        return math.fsum(prices.saved(target, rank) for target, rank in ranks)

    def linears_of(chosen: Sequence[int]) -> list[Target]:
        return [target for unit in chosen for target in units.members[unit]]

    ratio = config.DEFAULT_COMPRESSION_RATIO if config.compression_ratio is None else config.compression_ratio
    saving = ratio * total_parameters if prices.saving is None else prices.saving
    sets = (units.most_redundant(count) for count in range(len(shapes) + 1))
    chosen = next((each for each in sets if saved(each) >= saving), units.most_redundant(len(shapes)))
    if prices.saving is not None and config.allocation == "global":
        return uniform_budget(shapes, chosen, config.retain_ratio)
    if config.target_bytes is not None:
        sizes = {target.module.weight.element_size() for target in linears_of(list(shapes))}
        if len(sizes) > 1:
            raise ValueError(
                f"linears have {sorted(sizes)} bytes per weight; target_bytes then needs allocation='global'"
            )
        ratio = saving / max(sizes) / total_parameters
    return solve_compression_ratio(shapes, chosen, total_parameters, ratio, config.retain_ratio)


def _plan(budget: Budget, units: Units) -> Plan:
    pairs = (zip(units.members[unit], ranks, strict=True) for unit, ranks in budget.ranks.items())
    layers = sorted({unit // units.per_layer for unit in budget.ranks})
    return Plan(budget.retain_ratio, tuple(layers), dict(chain.from_iterable(pairs)))


def ceilings(config: GraspConfig, plans: Mapping[str, Plan]) -> dict[Target, int]:
    """The largest rank that each linear can be given."""
    result: dict[Target, int] = {}
    for plan in plans.values():
        for target, rank in plan.ranks.items():
            most = rank if config.allocation == "uniform" else break_even_rank(dense_shape(target.module))
            result[target] = max(most, result.get(target, 0))
    return result


def predicted_seconds(
    costs: CostTable,
    targets: Mapping[int, Sequence[Target]],
    done: Sequence[ModuleReport],
    removed: Sequence[int],
) -> dict[str, float]:
    """What decoding a token takes, dense and after what was done."""
    ranks = {report.name: report.rank or None for report in done}
    dense = ((dense_shape(t.module), None) for t in chain.from_iterable(targets.values()))
    kept = (target for layer, found in targets.items() if layer not in removed for target in found)
    after = ((dense_shape(target.module), ranks.get(target.name)) for target in kept)
    return {"dense": costs.predict(dense, len(targets)), "after": costs.predict(after, len(targets) - len(removed))}
