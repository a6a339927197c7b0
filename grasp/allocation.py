"""One budget over many matrices: which rank each gets, or whether it stays dense. Pure functions."""

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
    """What may be done to one matrix: parallel arrays, in any order, one entry each."""

    ranks: tuple[int, ...]  # DENSE for leaving it as it is
    costs: tuple[float, ...]  # parameters, bytes, or seconds
    losses: tuple[float, ...]  # predicted increase of the loss, of one unit in all matrices


DENSE = -1


def rank_choices(
    scores: Sequence[float], costs: Sequence[float], dense_cost: float, *, multiple: int = 1, least: int = 1
) -> Choices:
    """The ranks worth considering for a matrix whose groups are kept from the highest score down, and dense.

    Args:
        scores: of the groups, in units of loss, in any order.
        costs: of rank 0, 1, …, one more than there are scores.
        dense_cost: of the matrix as it is; ranks that cost as much or more are left out.
        multiple: consider multiples of this rank only, such as the kernels' 16, and ranks below the first.
        least: smallest rank to consider; 0 lets the matrix vanish.

    Returns:
        The losses are the sums of the dropped scores; 0 for dense.
    """
    ordered = np.sort(np.asarray(scores, dtype=np.float64))[::-1]
    dropped = np.concatenate([np.cumsum(ordered[::-1])[::-1], [0.0]])
    ranks = [
        rank
        for rank in range(least, len(costs))
        if costs[rank] < dense_cost and (rank % multiple == 0 or rank < multiple)
    ]
    return Choices(
        (*ranks, DENSE), (*(costs[rank] for rank in ranks), dense_cost), (*(dropped[rank] for rank in ranks), 0.0)
    )


def allocate(matrices: Sequence[Choices], budget: float, *, grid: int = GRID) -> list[int]:
    """Pick one choice per matrix, with the least total loss among those whose total cost is within the budget.

    A multiple-choice knapsack, solved twice: by dynamic programming over the cost in ``grid`` steps, which is exact
    where all costs are whole steps, as for few matrices; and by going up from the cheapest choices, always by the
    change that lowers the loss most per cost, which comes within one such change of the optimum and suits many
    matrices. What either leaves of the budget is spent in the second way.

    Args:
        matrices: the choices of each.
        budget: largest total cost.
        grid: steps the budget is divided into.

    Returns:
        For each matrix the index of its choice.

    Raises:
        ValueError: if even the cheapest choices cost more than the budget; the message has both.
    """
    cheapest = sum(min(choices.costs) for choices in matrices)
    if cheapest > budget:
        raise ValueError(f"the budget is {budget:.6g}, but the cheapest choices cost {cheapest:.6g} together")
    if not matrices:
        return []
    starts = (
        _dynamic_program(matrices, budget, cheapest, grid),
        [choices.costs.index(min(choices.costs)) for choices in matrices],
    )
    solutions = [_spend(matrices, budget, picked) for picked in starts]
    return min(solutions, key=lambda picked: _loss(matrices, picked))


def _dynamic_program(matrices: Sequence[Choices], budget: float, cheapest: float, grid: int) -> list[int]:
    """Exact for costs above the cheapest, rounded up to steps: so that the cheapest choices always fit."""
    step, steps = _steps(matrices, budget - cheapest, grid)
    best = np.zeros(steps + 1)  # least loss of the matrices so far, for each number of steps spent at most
    decisions = np.empty((len(matrices), steps + 1), dtype=np.int32)
    extras = []
    for i, choices in enumerate(matrices):
        extra = _in_steps(np.asarray(choices.costs) - min(choices.costs), step, steps + 1)
        extras.append(extra)
        total = np.full(steps + 1, np.inf)
        for j in np.flatnonzero(extra <= steps):
            candidate = best[: steps + 1 - extra[j]] + choices.losses[j]
            better = candidate < total[extra[j] :]
            total[extra[j] :][better] = candidate[better]
            decisions[i, extra[j] :][better] = j
        best = total
    picked, left = [0] * len(matrices), steps
    for i in reversed(range(len(matrices))):
        picked[i] = int(decisions[i, left])
        left -= int(extras[i][picked[i]])
    return picked


def _cost(matrices: Sequence[Choices], picked: Sequence[int]) -> float:
    return math.fsum(choices.costs[j] for choices, j in zip(matrices, picked, strict=True))


def _loss(matrices: Sequence[Choices], picked: Sequence[int]) -> float:
    return math.fsum(choices.losses[j] for choices, j in zip(matrices, picked, strict=True))


def _steps(matrices: Sequence[Choices], room: float, grid: int) -> tuple[float, int]:
    """Size and number of steps: the greatest common divisor of whole costs, where the budget has few enough of it."""
    costs = [cost - min(choices.costs) for choices in matrices for cost in choices.costs]
    if all(float(cost).is_integer() for cost in costs):
        divisor = math.gcd(*(int(cost) for cost in costs))
        if divisor and room / divisor <= grid:
            return float(divisor), int(room // divisor)
    return room / grid, grid if room > 0 else 0


def _in_steps(extra: Array, step: float, most: int) -> npt.NDArray[np.int64]:
    """Costs in whole steps, rounded up, none above ``most``."""
    if step == 0:
        return np.where(extra > 0, most, 0)
    return np.minimum(np.ceil(extra / step), most).astype(np.int64)


def _spend(matrices: Sequence[Choices], budget: float, picked: Sequence[int]) -> list[int]:
    """The affordable change of one choice that lowers the loss most per cost, again and again, until there is none."""
    chosen = list(picked)
    costs = [np.asarray(choices.costs) for choices in matrices]
    losses = [np.asarray(choices.losses) for choices in matrices]
    left = budget - _cost(matrices, chosen)
    changes: list[tuple[float, int, int]] = []  # a heap of each matrix's best: minus the rate, the matrix, the choice

    def consider(i: int) -> None:
        gain, price = losses[i][chosen[i]] - losses[i], costs[i] - costs[i][chosen[i]]
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
