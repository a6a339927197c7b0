"""Layers, ranks and indices, from scores. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

if TYPE_CHECKING:
    from torch import Tensor

Shape = tuple[int, int]  # (N, K): out_features, in_features
Form = Literal["factored", "pivoted"]  # how a matrix of rank R is stored: as U (N, R) and Vh (R, K), or in R² fewer
FORMS: tuple[Form, ...] = get_args(Form)


class Budget(NamedTuple):
    """The layers to compress, and for each the rank of every matrix, in the order of its shapes."""

    retain_ratio: float
    ranks: dict[int, tuple[int, ...]]  # layer → ranks, ascending layers


def factor_shapes(shape: Shape, rank: int, form: Form) -> tuple[Shape, Shape]:
    """The shapes of U and Vh of a matrix (N, K) of rank R: (N, R) or, if it is pivoted, (N − R, R); and (R, K)."""
    n, k = shape
    return (n - rank * (form == "pivoted"), rank), (rank, k)


def parameters_at(shape: Shape, rank: int, form: Form) -> int:
    """The parameters of a matrix of rank R: ``R·(N + K)``, and ``R·(N + K − R)`` if it is pivoted."""
    return sum(map(math.prod, factor_shapes(shape, rank, form)))


def parameters_removed(shape: Shape, rank: int, form: Form) -> int:
    """The parameters that a rank saves; negative if the factors are larger than the matrix."""
    return math.prod(shape) - parameters_at(shape, rank, form)


def rank_for_retain_ratio(shape: Shape, retain_ratio: float, form: Form) -> int:
    """The rank at which a matrix keeps ``retain_ratio`` of its parameters, rounded down; at least 1.

    It is ``int(N·K·r / (N + K))``, and for pivoted factors the smaller root of ``R·(N + K − R) = N·K·r``, below full
    rank. Source: arXiv 2501.00339, where the ratio is of parameters, not of singular groups.
    """
    n, k = shape
    if form == "factored":
        return max(1, int(n * k * retain_ratio / (n + k)))
    root = math.sqrt((n + k) ** 2 - 4 * n * k * retain_ratio)
    return max(1, min(int((n + k - root) / 2), break_even_rank(shape, form)))


def break_even_rank(shape: Shape, form: Form) -> int:
    """The largest rank at which the factors have fewer parameters than the matrix; 0 if there is none."""
    n, k = shape
    return (n * k - 1) // (n + k) if form == "factored" else min(n, k) - 1


def retained_indices(importance: Tensor, rank: int) -> Tensor:
    """The ``rank`` most important singular groups, ascending. Of equals, the larger singular value is retained.

    Args:
        importance: (groups,) non-negative, in the order of the singular values.
        rank: number of groups to retain.

    Raises:
        ValueError: if there are fewer groups than ``rank``.
    """
    if not 1 <= rank <= len(importance):
        raise ValueError(f"rank must be between 1 and the {len(importance)} singular groups, got {rank}")
    return importance.argsort(descending=True, stable=True)[:rank].sort().values


def rank_for_threshold(importance: Tensor, threshold_ratio: float, shape: Shape, form: Form) -> int:
    """The fewest groups whose importance adds up to a fraction of the total, at most the break-even rank."""
    ordered = importance.cpu().double().sort(descending=True).values
    cumulative = ordered.cumsum(0)
    reached = int((cumulative < threshold_ratio * cumulative[-1]).sum()) + 1
    return max(1, min(reached, break_even_rank(shape, form), len(importance)))


def redundant_layers(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """The ``count`` layers with the smallest scores, most redundant first. Of equals, the shallower comes first."""
    return tuple(sorted(range(len(scores)), key=lambda layer: scores[layer])[:count])


def solve_compression_ratio(
    shapes: Mapping[int, Sequence[Shape]],
    order: Sequence[int],
    total_parameters: int,
    compression_ratio: float,
    retain_ratio: float,
    form: Form,
    *,
    at_least: bool = False,
) -> Budget:
    """The most redundant layers to compress, and their ranks, to remove a fraction of the whole model.

    The number of layers is the smallest that reaches the target at ``retain_ratio``. Then the ratio is solved again to
    meet the target as closely as whole ranks allow.

    Args:
        shapes: for each layer the shapes of the matrices that can be replaced.
        order: layers, most redundant first.
        total_parameters: parameters of the whole model.
        compression_ratio: fraction of them to remove, in [0, 1).
        retain_ratio: fraction of a matrix's parameters that sets the number of layers.
        form: of the factors.
        at_least: whether no less than the target may be removed.

    Raises:
        ValueError: if rank 1 everywhere does not remove that much.
    """

    def removed(count: int, ratio: float) -> int:
        return sum(
            parameters_removed(shape, rank_for_retain_ratio(shape, ratio, form), form)
            for layer in order[:count]
            for shape in shapes[layer]
        )

    target = compression_ratio * total_parameters
    if target == 0:
        return Budget(retain_ratio, {})
    if (most := removed(len(order), 0.0)) < target:
        raise ValueError(
            f"compression_ratio={compression_ratio} asks for {target:.0f} of {total_parameters} parameters, but rank 1 "
            f"in every eligible matrix removes {most}; the largest possible ratio is {most / total_parameters:.4f}"
        )
    count = next((n for n in range(1, len(order) + 1) if removed(n, retain_ratio) >= target), len(order))
    low, high = 0.0, 1.0  # removed(low) >= target; it falls, in steps, as the ratio rises
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if removed(count, middle) >= target else (low, middle)
    budget = uniform_budget(shapes, order[:count], low, form)
    excess = removed(count, low) - target
    ranks = {layer: list(values) for layer, values in budget.ranks.items()}
    for layer, values in ranks.items():  # add a group where the next step of the ratio would, if that helps
        for i, shape in enumerate(shapes[layer]):
            step = parameters_at(shape, values[i] + 1, form) - parameters_at(shape, values[i], form)
            helps = step <= excess if at_least else abs(excess - step) < abs(excess)
            if helps and rank_for_retain_ratio(shape, high, form) > values[i]:
                values[i] += 1
                excess -= step
    return Budget(low, {layer: tuple(values) for layer, values in ranks.items()})


def uniform_budget(
    shapes: Mapping[int, Sequence[Shape]], layers: Sequence[int], retain_ratio: float, form: Form
) -> Budget:
    """Retain the same fraction of every matrix of ``layers``."""
    ranks = {
        layer: tuple(rank_for_retain_ratio(shape, retain_ratio, form) for shape in shapes[layer])
        for layer in sorted(layers)
    }
    return Budget(retain_ratio, ranks)
