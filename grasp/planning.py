"""What may be compressed and how far: scopes, their budgets, and the choice within them. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.allocation import DENSE, allocate, rank_choices
from grasp.architecture import Target
from grasp.calibration import CalibrationBatch
from grasp.config import GraspConfig
from grasp.errors import CalibrationError
from grasp.modules import dense_shape
from grasp.selection import Budget, break_even_rank, parameters_removed, retained_indices, solve_compression_ratio

HELD_OUT = 8  # one batch in so many decides between scopes

Choice = Mapping[str, Tensor]  # indices, importance, spectrum; U, S and Vh of the groups kept; or why none: ``LEFT``
LEFT = {
    "no loss": "its output does not reach the loss",
    "dense": "stays dense: the budget does more elsewhere",
}


class Plan(NamedTuple):
    """Which linears may be compressed; the uniform ranks say how many parameters they may keep together."""

    retain_ratio: float
    layers: tuple[int, ...]  # ascending
    ranks: dict[Target, int]


def choose_plans(
    config: GraspConfig, budget: Budget, targets: Mapping[int, Sequence[Target]], total_parameters: int
) -> dict[str, Plan]:
    """A plan for each scope that is considered, removing as many parameters as ``budget`` does in redundant layers."""
    plans = {"redundant": _plan(budget, targets)}
    if config.scope != "redundant":
        removed = sum(
            parameters_removed(dense_shape(target.module), rank) for target, rank in plans["redundant"].ranks.items()
        )
        shapes = {layer: [dense_shape(target.module) for target in found] for layer, found in targets.items()}
        # At a ratio of 1 no number of layers reaches the target: all of them share it.
        budget = solve_compression_ratio(shapes, tuple(shapes), total_parameters, removed / total_parameters, 1.0)
        plans["model"] = _plan(budget, targets)
    return plans if config.scope == "auto" else {config.scope: plans[config.scope]}


def _plan(budget: Budget, targets: Mapping[int, Sequence[Target]]) -> Plan:
    pairs = (zip(targets[layer], ranks, strict=True) for layer, ranks in budget.ranks.items())
    return Plan(budget.retain_ratio, tuple(budget.ranks), dict(chain.from_iterable(pairs)))


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
            "scope='auto' holds some calibration batches out; give at least 2, or a smaller batch size"
        )
    count = max(1, len(batches) // HELD_OUT)
    return batches[:-count], batches[-count:]


def within_budget(
    choices: Sequence[tuple[Target, Choice]], plan: Plan, config: GraspConfig
) -> list[tuple[Target, Choice]]:
    """Cut what was chosen to what a plan allows: to its ranks, or where the same parameters lower the loss most."""
    chosen = [(target, choice) for target, choice in choices if target in plan.ranks and "indices" in choice]
    ranks = plan.ranks
    if config.allocation == "global":
        shapes = {target: dense_shape(target.module) for target, _ in chosen}
        options = [
            rank_choices(choice["importance"].tolist(), _costs(shapes[target]), math.prod(shapes[target]))
            for target, choice in chosen
        ]
        allowance = sum(rank * sum(shapes[target]) for target, rank in plan.ranks.items() if target in shapes)
        picked = allocate(options, allowance)
        ranks = {target: each.ranks[j] for (target, _), each, j in zip(chosen, options, picked, strict=True)}
    cut = {target: _cut(choice, ranks[target]) for target, choice in chosen}
    return [(target, cut.get(target, choice)) for target, choice in choices if target in plan.ranks]


def _costs(shape: tuple[int, int]) -> list[int]:
    """Parameters of the factors at rank 0, 1, …"""
    return [rank * sum(shape) for rank in range(min(shape) + 1)]


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
