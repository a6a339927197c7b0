"""What may be compressed and how far: scopes, their budgets, and the choice within them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.allocation import DENSE, Choices, Layer, allocate_layers, rank_choices
from grasp.architecture import BLOCKS, Target, decoder
from grasp.calibration import CalibrationBatch
from grasp.config import GraspConfig
from grasp.errors import CalibrationError, UnsupportedModelError
from grasp.latency import CostTable
from grasp.modules import SVD, dense_shape
from grasp.redundancy import Redundancy, least_changing_run
from grasp.report import ModuleReport, model_size
from grasp.selection import (
    Budget,
    break_even_rank,
    parameters_removed,
    rank_for_retain_ratio,
    redundant_layers,
    retained_indices,
    solve_compression_ratio,
    uniform_budget,
)
from grasp_kernels.packing import RANK_MULTIPLE

# Of the budget's saving: how much a progressive schedule spends before it takes statistics anew. See docs/study.md.
FIRST_SHARE = 0.6
HELD_OUT = 8  # one batch in so many decides between candidates
# Of the measured loss that removing a layer adds, against the predicted one of ranks, which is often too low; at the
# last a layer goes where nothing else will do. See docs/latency.md.
SCALES = (0.5, 1.0, 2.0, 1e6)

Choice = Mapping[str, Tensor]  # indices, importance, spectrum; U, S and Vh of the groups kept; or why none: ``LEFT``
LEFT = {
    "no loss": "its output does not reach the loss",
    "dense": "stays dense: the budget does more elsewhere",
    "removed": "its layer is removed",
}


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
                "target_latency needs costs: give compress_ a grasp.latency.CostTable, such as "
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


def hold_out(batches: Sequence[CalibrationBatch]) -> tuple[Sequence[CalibrationBatch], Sequence[CalibrationBatch]]:
    """The batches for the statistics, and the last eighth, at least one, to decide by."""
    if len(batches) < 2:
        raise CalibrationError(
            "scope='auto' and remove_layers hold some calibration batches out; give at least 2, or a smaller batch size"
        )
    count = max(1, len(batches) // HELD_OUT)
    return batches[:-count], batches[-count:]


class Candidate(NamedTuple):
    """One way to keep to the budget."""

    scope: str
    removed: tuple[int, ...]  # layers that go, ascending
    ranks: dict[Target, int]  # of the linears that are scored and stay; ``DENSE`` for those that stay as they are

    @property
    def name(self) -> str:
        """The scope, and the layers that go."""
        return f"{self.scope} without {', '.join(map(str, self.removed))}" if self.removed else self.scope


def candidates(
    choices: Sequence[tuple[Target, Choice]],
    plans: Mapping[str, Plan],
    config: GraspConfig,
    prices: Prices,
    removal: Mapping[int, float],
    nats: float,
) -> dict[str, Candidate]:
    """For each plan the ways to keep to its budget, by name: one, or where layers may go several.

    Losses of layers are measured, those of ranks predicted, by how much too low is not known: so the former are taken
    ``SCALES`` times. Only measuring the results can tell which is best.

    Args:
        choices: the groups of each linear that can be kept, with the importance of all.
        plans: of each scope.
        config: its ``allocation`` decides.
        prices: what is budgeted.
        removal: for each layer that may go what this adds to the loss, in nats per token.
        nats: what a score of 1 adds to the loss, per token.
    """
    found: dict[str, Candidate] = {}
    for scope, plan in plans.items():
        chosen = {target: choice for target, choice in choices if target in plan.ranks and "indices" in choice}
        if config.allocation == "uniform":
            found[scope] = Candidate(scope, (), {target: plan.ranks[target] for target in chosen})
            continue
        for scale in SCALES if removal else SCALES[:1]:
            losses = {layer: scale * loss / nats for layer, loss in removal.items()}
            candidate = _allocated(scope, chosen, plan, prices, losses)
            found.setdefault(candidate.name, candidate)
    return found


def partway(choices: Sequence[tuple[Target, Choice]], plan: Plan, prices: Prices) -> dict[Target, SVD]:
    """The groups that are kept where ``FIRST_SHARE`` of the saving is spent globally, of what does not stay dense."""
    chosen = {target: choice for target, choice in choices if target in plan.ranks and "indices" in choice}
    ranks = _allocated("", chosen, plan, prices, {}, FIRST_SHARE).ranks
    cuts = {target: _cut(chosen[target], rank) for target, rank in ranks.items() if rank != DENSE}
    return {target: SVD(kept["U"], kept["S"], kept["Vh"]) for target, kept in cuts.items()}


def _allocated(
    scope: str,
    chosen: Mapping[Target, Choice],
    plan: Plan,
    prices: Prices,
    removal: Mapping[int, float],
    share: float = 1.0,
) -> Candidate:
    """Where the budget lowers the loss most."""
    members = {layer: [target for target in chosen if target.layer == layer] for layer in plan.layers}
    dense = {layer: math.fsum(prices.linear(target, DENSE) for target in found) for layer, found in members.items()}
    layers = [
        Layer(
            [_options(target, chosen[target], prices) for target in found],
            rest=prices.layer(layer) - dense[layer],
            removal=removal.get(layer),
        )
        for layer, found in members.items()
    ]
    uniform = math.fsum(prices.saved(target, plan.ranks[target]) for target in chosen)
    saving = uniform if prices.saving is None else prices.saving
    budget = math.fsum(map(prices.layer, members)) - share * saving
    budget *= 1 + 1e-12  # seconds add up to a little more or less than the same seconds in another order
    ranks: dict[Target, int] = {}
    removed = []
    for (layer, found), kept, picked in zip(members.items(), layers, allocate_layers(layers, budget), strict=True):
        if picked is None:
            removed.append(layer)
            continue
        pairs = zip(kept.matrices, picked, strict=True)
        ranks |= {target: matrix.ranks[j] for target, (matrix, j) in zip(found, pairs, strict=True)}
    return Candidate(scope, tuple(removed), ranks)


def cut(choices: Sequence[tuple[Target, Choice]], plan: Plan, candidate: Candidate) -> Iterator[tuple[Target, Choice]]:
    """What was chosen of the linears of a plan, cut to a candidate's ranks."""
    for target, choice in choices:
        if target in candidate.ranks:
            yield target, _cut(choice, candidate.ranks[target])
        elif target.layer in candidate.removed:
            yield target, {"removed": torch.ones(())}
        elif target in plan.ranks:
            yield target, choice


def _options(target: Target, choice: Choice, prices: Prices) -> Choices:
    """What may be done to a linear: the ranks that its groups make up, or nothing."""
    costs = [prices.linear(target, rank) for rank in range(len(choice["indices"]) + 1)]
    return rank_choices(choice["importance"].tolist(), costs, prices.linear(target, DENSE), multiple=prices.multiple)


def nats_per_score(config: GraspConfig, tokens: int) -> float:
    """What a group's score of 1 predicts that dropping it adds to the loss, in nats per token.

    First order: |σ Σ ∂L/∂σ|, second: ½ σ² Σ (∂L/∂σ)², both sums over tokens; in the kfac basis ½ σ² for each token.
    """
    return {"taylor": 1 / tokens, "fisher": 0.5 / tokens, "magnitude": 0.5}.get(config.metric, math.nan)


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


def _cut(choice: Choice, rank: int) -> Choice:
    """Keep the most important groups of those chosen; or none, for a matrix that stays dense."""
    if rank == DENSE:
        return {"dense": torch.ones(())}
    best = retained_indices(choice["importance"][choice["indices"]], rank)
    return {
        "indices": choice["indices"][best],
        **{name: choice[name] for name in ("importance", "spectrum")},
        **{"U": choice["U"][:, best], "S": choice["S"][best], "Vh": choice["Vh"][best]},
    }
