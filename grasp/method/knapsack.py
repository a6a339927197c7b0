"""One budget over many matrices: the rank of each, or whether it stays dense. Pure functions."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

GRID = 20_000  # steps of the budget; a choice's cost is rounded up to whole steps

Array = npt.NDArray[np.float64]


class Choices(NamedTuple):
    """The choices for one matrix: parallel arrays in any order, one entry for each choice."""

    ranks: tuple[int, ...]  # DENSE to leave the matrix as it is, ROUNDED to give it fewer bits
    costs: tuple[float, ...]  # parameters, bytes, or seconds
    losses: tuple[float, ...]  # predicted increase of the loss, in the same unit for all matrices


DENSE = -1
ROUNDED = -2  # dense, with fewer bits


def rank_choices(scores: Sequence[float], costs: Sequence[float], dense_cost: float, *, multiple: int = 1) -> Choices:
    """The ranks to consider for a matrix that retains its groups of highest score, and dense.

    Args:
        scores: of the groups, in units of loss, in any order.
        costs: of rank 0, 1, …, one more than there are scores.
        dense_cost: of the dense matrix; ranks that cost as much or more are left out.
        multiple: consider multiples of this rank only, such as the kernels' 16, and ranks below the first.

    Returns:
        The losses are the sums of the dropped scores; 0 for dense.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    dropped = np.concatenate([np.cumsum(ordered[::-1])[::-1], [0.0]])
    ranks = [
        rank for rank in range(1, len(costs)) if costs[rank] < dense_cost and (rank % multiple == 0 or rank < multiple)
    ]
    return Choices(
        (*ranks, DENSE), (*(costs[rank] for rank in ranks), dense_cost), (*(dropped[rank] for rank in ranks), 0.0)
    )


class Layer(NamedTuple):
    """The matrices of one decoder layer, and the cost and the loss of removing the layer."""

    matrices: Sequence[Choices]
    rest: float = 0.0  # cost of the rest of the layer, which is removed with it
    removal: float | None = None  # loss if the layer is removed; ``None`` if it must stay


def allocate_layers(layers: Sequence[Layer], budget: float) -> list[list[int] | None]:
    """Pick one choice per matrix, or remove the layer, with the least total loss among what costs the budget at most.

    A multiple-choice knapsack, solved in two ways; the better solution is returned. Dynamic programming over the cost
    in ``GRID`` steps is exact if all costs are whole steps, as with few matrices. The greedy solution starts at the
    cheapest choices, in the layers that dynamic programming leaves, and makes the change that lowers the loss most per
    cost, again and again. It is within one such change of the optimum, and suits many matrices. Both spend the rest of
    the budget greedily.

    Args:
        layers: the choices of each matrix, layer by layer.
        budget: largest total cost.

    Returns:
        For each layer the index of each matrix's choice, or ``None`` where the layer is removed.

    Raises:
        ValueError: if even the cheapest choices cost more than the budget; the message has both.
    """
    cheapest = math.fsum(_least(layer) for layer in layers)
    if cheapest > budget:
        raise ValueError(f"the budget is {budget:.6g}, but the cheapest choices cost {cheapest:.6g} together")
    exact = _dynamic_program(layers, budget - cheapest)
    kept = [(layer, picked) for layer, picked in zip(layers, exact, strict=True) if picked is not None]
    matrices = [choices for layer, _ in kept for choices in layer.matrices]
    left = budget - math.fsum(layer.rest for layer, _ in kept)
    starts = (
        [choice for _, picked in kept for choice in picked],
        [choices.costs.index(min(choices.costs)) for choices in matrices],
    )
    solutions = [_spend(matrices, left, start) for start in starts]
    best = min(solutions, key=lambda picked: _loss(matrices, picked))
    choices_left = iter(best)
    return [None if picked is None else [next(choices_left) for _ in picked] for picked in exact]


def _least(layer: Layer) -> float:
    """The lowest cost of a layer, which may be removed."""
    return 0.0 if layer.removal is not None else least_cost(layer)


def least_cost(layer: Layer) -> float:
    """The lowest cost of a layer that stays, of all the ranks of its linears."""
    return math.fsum([layer.rest, *(min(choices.costs) for choices in layer.matrices)])


def _dynamic_program(layers: Sequence[Layer], room: float) -> list[list[int] | None]:
    """Exact for costs above the cheapest, rounded up to steps; so the cheapest choices always fit."""
    step, steps = _steps(layers, room)
    best = np.zeros(steps + 1)  # least loss of the layers so far, for each number of steps spent at most
    trail = []
    for layer in layers:
        offset = int(_in_steps(np.asarray([least_cost(layer) - _least(layer)]), step, steps + 1)[0])
        staying = _shifted(best, offset)
        passed = []
        for choices in layer.matrices:
            extra = _in_steps(np.asarray(choices.costs) - min(choices.costs), step, steps + 1)
            staying, decisions = _add_matrix(staying, choices, extra)
            passed.append((extra, decisions))
        going = np.full(steps + 1, np.inf) if layer.removal is None else best + layer.removal
        gone = going < staying
        best = np.where(gone, going, staying)
        trail.append((offset, passed, gone))
    picked: list[list[int] | None] = []
    left = steps
    for offset, passed, gone in reversed(trail):
        if gone[left]:
            picked.append(None)
            continue
        chosen = []
        for extra, decisions in reversed(passed):
            chosen.append(int(decisions[left]))
            left -= int(extra[chosen[-1]])
        left -= offset
        picked.append(chosen[::-1])
    return picked[::-1]


def _add_matrix(best: Array, choices: Choices, extra: npt.NDArray[np.int64]) -> tuple[Array, npt.NDArray[np.int32]]:
    """The least loss with one more matrix, for each number of steps, and the choice that gives it."""
    total = np.full(len(best), np.inf)
    decisions = np.zeros(len(best), dtype=np.int32)
    losses = np.asarray(choices.losses)
    order = np.lexsort((losses, extra))
    lowest_before = np.minimum.accumulate(np.concatenate(([np.inf], losses[order][:-1])))
    order = order[losses[order] < lowest_before]  # another that costs no more steps loses as little
    for j in order[extra[order] < len(best)]:
        candidate = best[: len(best) - extra[j]] + losses[j]
        better = candidate < total[extra[j] :]
        total[extra[j] :][better] = candidate[better]
        decisions[extra[j] :][better] = j
    return total, decisions


def _shifted(best: Array, by: int) -> Array:
    """``best`` with ``by`` more steps; infinite if there are not as many."""
    return np.concatenate([np.full(min(by, len(best)), np.inf), best[: max(len(best) - by, 0)]])


def _loss(matrices: Sequence[Choices], picked: Sequence[int]) -> float:
    return math.fsum(choices.losses[j] for choices, j in zip(matrices, picked, strict=True))


def _steps(layers: Sequence[Layer], room: float) -> tuple[float, int]:
    """Size and number of steps. The size is the greatest common divisor of whole costs, if that makes few steps."""
    costs = [cost - min(choices.costs) for layer in layers for choices in layer.matrices for cost in choices.costs]
    costs += [least_cost(layer) - _least(layer) for layer in layers]
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs))
        if divisor and room / divisor <= GRID:
            return float(divisor), int(room // divisor)
    return room / GRID, GRID if room > 0 else 0


def _in_steps(extra: Array, step: float, most: int) -> npt.NDArray[np.int64]:
    """Costs in whole steps, rounded up, none above ``most``."""
    if step == 0:
        return np.where(extra > 0, most, 0)
    return np.minimum(np.ceil(extra / step), most).astype(np.int64)


def _spend(matrices: Sequence[Choices], budget: float, picked: Sequence[int]) -> list[int]:
    """Make the affordable change of one choice that lowers the loss most per cost, until there is none."""
    chosen = list(picked)
    costs = [np.asarray(choices.costs) for choices in matrices]
    losses = [np.asarray(choices.losses) for choices in matrices]
    left = budget - math.fsum(choices.costs[j] for choices, j in zip(matrices, chosen, strict=True))
    changes: list[tuple[float, int, int]] = []  # a heap of each matrix's best: minus the rate, the matrix, the choice

    def consider(i: int) -> None:
        gain, price = losses[i][chosen[i]] - losses[i], costs[i] - costs[i][chosen[i]]
        with np.errstate(over="ignore"):  # of a change that costs nothing
            rate = np.where((gain > 0) & (price <= left), gain / np.maximum(price, 1e-300), 0.0)
        best = int(rate.argmax())
        if rate[best] > 0:
            heapq.heappush(changes, (-float(rate[best]), i, best))

    for i in range(len(matrices)):
        consider(i)
    while changes:
        _, i, best = heapq.heappop(changes)
        price = float(costs[i][best] - costs[i][chosen[i]])
        if price <= left:
            left -= price
            chosen[i] = best
        consider(i)
    return chosen
