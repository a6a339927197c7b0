"""Importance of a singular group, from its singular value and the moments of its gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, NamedTuple

from torch import Tensor


class Metric(NamedTuple):
    """Importance of a singular group from its singular value and the moments of ∂L/∂σ, (groups,) each."""

    score: Callable[[Tensor, Tensor, Tensor], Tensor]  # of σ, Σ ∂L/∂σ, and Σ (∂L/∂σ)² token by token
    moment: Literal["none", "first", "second"]  # the highest it needs


# METHOD: first-order sums keep their sign over the calibration set; the absolute value is taken once, at the end.
METRICS: dict[str, Metric] = {
    "taylor": Metric(lambda values, first, second: (values * first).abs(), "first"),
    "gradient": Metric(lambda values, first, second: first.abs(), "first"),
    "magnitude": Metric(lambda values, first, second: values.square(), "none"),
    "fisher": Metric(lambda values, first, second: values.square() * second, "second"),
}


def in_units_of_loss(basis: str, metric: str) -> bool:
    """Whether the scores of different matrices may be compared: only what estimates a change of the loss may."""
    return metric in ("taylor", "fisher") or (basis, metric) == ("kfac", "magnitude")
