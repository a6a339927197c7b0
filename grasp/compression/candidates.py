"""The candidates that keep to a global budget: allocations of ranks, with or without whole layers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from grasp.compression.budget import Plan, Prices, required_saving
from grasp.compression.selection import Selection, Selections
from grasp.formatting import layer_ranges
from grasp.method.knapsack import DENSE, ROUNDED, Choices, Layer, allocate_layers, least_cost, rank_choices
from grasp.model.targets import Target

FIRST_SHARE = 0.6  # the share of the saving after which a progressive schedule gathers statistics again; docs/tried.md
HELD_OUT = 8  # for so many calibration batches, one is held out to decide between candidates
# What single blocks and layers lose is measured on so many held-out tokens at most, the first of so many sequences.
MEASURED_TOKENS, MEASURED_SEQUENCES = 1024, 8
# The measured loss of removing a layer is multiplied by each of these and compared with the predicted losses of ranks,
# which are often too low. With the last one, a layer is removed only if ranks cannot meet the budget. docs/latency.md.
REMOVAL_LOSS_SCALES = (0.5, 1.0, 2.0, 1e6)


class Candidate(NamedTuple):
    """One way to keep to the budget."""

    name: str
    removed: tuple[int, ...]  # layers to remove, ascending
    ranks: dict[Target, int]  # of linears that are scored and stay, or ``DENSE``, ``ROUNDED``; others stay dense
    map: str = ""  # file of the linear map that takes the place of the removed layers, if one does
    fitted: bool = False  # whether left factors are fitted to the dense model's outputs
    size: int = 0  # of a candidate of the whole model in a narrowed run: bytes of all weights; 0 for others
    seconds: float | None = None  # likewise: the predicted time to decode a token, if there are costs


def candidates(
    selections: Selections, plan: Plan, prices: Prices, removal: Mapping[int, float], nats: float
) -> dict[str, Candidate]:
    """The allocations of ranks that keep to the budget, by name: one, or several if layers may be removed.

    The losses of removing layers are measured, the losses of ranks predicted, and the predictions are too low by an
    unknown factor. So the measured losses are scaled by each of ``REMOVAL_LOSS_SCALES``. Only measuring the candidates
    can tell which is best.

    Args:
        removal: for each layer that may be removed, the loss that this adds, in nats per token.
        nats: the loss that a score of 1 adds, in nats per token.
    """
    scores = _scored(selections, plan)
    scales = REMOVAL_LOSS_SCALES if removal else REMOVAL_LOSS_SCALES[:1]
    result: dict[str, Candidate] = {}
    for scale in scales:
        losses = {layer: scale * loss / nats for layer, loss in removal.items()}
        candidate = _allocated(scores, plan, prices, losses)
        result.setdefault(candidate.name, candidate)
    return result


def has_low_rank(ranks: Iterable[int]) -> bool:
    """Whether a rank is neither ``DENSE`` nor ``ROUNDED``."""
    return any(rank not in (DENSE, ROUNDED) for rank in ranks)


def fitted_layers(ranks: Iterable[tuple[int, int]], removed: Iterable[int]) -> range:
    """Where a fit runs: from the first layer that changes to the last with a low-rank linear; none without such.

    Args:
        ranks: layer and rank of each linear that was scored and stays.
        removed: layers that are removed.
    """
    low = {layer for layer, rank in ranks if has_low_rank([rank])}
    return range(min(low | {*removed}), max(low) + 1) if low else range(0)


def only_removed(layers: Iterable[int]) -> Candidate:
    """The candidate in which some layers are removed and everything else stays dense."""
    layers = tuple(sorted(layers))
    return Candidate(f"layers {layer_ranges(layers)} removed", layers, {})


def low_ranks(selections: Selections, plan: Plan, prices: Prices, share: float) -> dict[Target, int]:
    """The ranks when a share of the saving is spent globally; linears that stay dense are left out.

    If the saving needs layers to be removed, it is that share of what ranks can save.
    """
    ranks = _allocated(_scored(selections, plan), plan, prices, {}, share).ranks
    return {target: rank for target, rank in ranks.items() if rank not in (DENSE, ROUNDED)}


def _scored(selections: Selections, plan: Plan) -> dict[Target, Selection]:
    return {t: selection for t, selection in selections.items() if t in plan.ranks and not selection.skipped}


def _allocated(
    selections: Selections, plan: Plan, prices: Prices, removal: Mapping[int, float], share: float | None = None
) -> Candidate:
    """Save what is required where that adds the least loss, or a share of that or of all that ranks can save."""
    members = {layer: [target for target in selections if target.layer == layer] for layer in plan.layers}
    layers = [_layer_choices(layer, linears, selections, prices, removal) for layer, linears in members.items()]
    saving = required_saving(prices, plan)
    dense = math.fsum(map(prices.layer, members))
    if share is not None or prices.saving is None or prices.capped:
        saving = (1.0 if share is None else share) * min(saving, dense - math.fsum(map(least_cost, layers)))
    budget = dense - saving
    budget *= 1 + 1e-12  # the same seconds in another order add up to a slightly different sum
    ranks: dict[Target, int] = {}
    removed = []
    for layer, choices, picked in zip(members, layers, allocate_layers(layers, budget), strict=True):
        if picked is None:
            removed.append(layer)
            continue
        ranks |= {
            target: matrix.ranks[choice]
            for target, matrix, choice in zip(members[layer], choices.matrices, picked, strict=True)
        }
    if removed and {*ranks.values()} <= {DENSE}:
        return only_removed(removed)
    without = f" without layers {layer_ranges(removed)}" if removed else ""
    return Candidate(f"low-rank{without}", tuple(removed), ranks)


def _layer_choices(
    layer: int, linears: Sequence[Target], selections: Selections, prices: Prices, removal: Mapping[int, float]
) -> Layer:
    dense = math.fsum(prices.linear(target, DENSE) for target in linears)
    matrices = [rank_choices_of(target, selections[target], prices) for target in linears]
    return Layer(matrices, rest=prices.layer(layer) - dense, removal=removal.get(layer))


def rank_choices_of(target: Target, selection: Selection, prices: Prices) -> Choices:
    """The ranks that a linear can be given, and dense, with fewer bits too if that has a score."""
    costs = [prices.linear(target, rank) for rank in range(len(selection.indices) + 1)]
    dense = prices.linear(target, DENSE)
    choices = rank_choices(selection.importance.tolist(), costs, dense, multiple=prices.multiple)
    for score in selection.rounding.tolist():
        ranks, prices_of, losses = choices
        choices = Choices((*ranks, ROUNDED), (*prices_of, prices.linear(target, ROUNDED)), (*losses, score))
    return choices
