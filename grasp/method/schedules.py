"""Which linears share a sweep over the calibration set, and in which order the sweeps run."""

from __future__ import annotations

from collections.abc import Callable, Collection
from itertools import groupby
from typing import Any, TypeVar

BLOCKS = ("mlp", "attention")  # in the order in which GRASP compresses a layer
L = TypeVar("L")  # has the index of its ``layer``, and its ``block``, one of ``BLOCKS``

# Linears with the same key share a sweep over the calibration set. Sweeps run in ascending order of their keys.
SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "sequential": lambda linear: (-linear.layer, BLOCKS.index(linear.block)),  # the paper: each sees all those before
    "per-layer": lambda linear: -linear.layer,
    "single-sweep": lambda linear: 0,  # all on the dense model
    "progressive": lambda linear: 0,  # likewise, and once more on the model with a part of the budget spent
}


def plan_sweeps(linears: Collection[L], schedule: str) -> list[list[L]]:
    """The linears of each sweep, in the order in which the sweeps run."""
    key = SCHEDULES[schedule]
    return [list(members) for _, members in groupby(sorted(linears, key=key), key=key)]
