"""A few cases in which every pair of values of every two axes occurs, in place of the full product."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

Case = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairwise(**axes: Sequence[Any]) -> list[Case]:
    """Cases that cover all pairs, always the same ones.

    Each case starts from a pair that is still missing and takes, axis by axis, the value that covers the most others.

    Args:
        axes: the values of each axis; a case maps each axis to one of its values.
    """
    missing = dict.fromkeys(
        pair
        for (a, values_a), (b, values_b) in itertools.combinations(axes.items(), 2)
        for pair in itertools.product([(a, value) for value in values_a], [(b, value) for value in values_b])
    )
    cases = []
    while missing:
        case: Case = dict(next(iter(missing)))
        for axis, values in axes.items():
            if axis not in case:
                case[axis] = max(values, key=lambda value: _gain({**case, axis: value}, axes, missing))
        case = {axis: case[axis] for axis in axes}
        for pair in _pairs(case, axes):
            missing.pop(pair, None)
        cases.append(case)
    return cases


def label(case: Case) -> str:
    """A test id."""
    return "-".join(f"{axis}={str(value).removeprefix('torch.')}" for axis, value in case.items())


def _pairs(case: Case, axes: Case) -> Iterator[Pair]:
    return itertools.combinations([(axis, case[axis]) for axis in axes if axis in case], 2)


def _gain(case: Case, axes: Case, missing: dict[Pair, None]) -> int:
    return sum(pair in missing for pair in _pairs(case, axes))
