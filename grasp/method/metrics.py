"""Importance of a singular group, from its singular value and the moments of its gradient.

A new metric is one row of ``METRICS``.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal, NamedTuple

from grasp.method.basis import BASES

if TYPE_CHECKING:  # configurations are read where torch is not needed, and torch takes seconds to import
    from torch import Tensor


class Metric(NamedTuple):
    """Importance of a singular group from its singular value and the moments of ∂L/∂σ, (groups,) each."""

    score: Callable[[Tensor, Tensor, Tensor], Tensor]  # of σ, Σ ∂L/∂σ, and Σ (∂L/∂σ)² token by token
    moment: Literal["none", "first", "second"]  # the highest moment that the score needs
    loss_bases: Collection[str] = ()  # the bases in which a score predicts the loss that dropping its group adds
    nats: Callable[[int], float] | None = None  # tokens → that loss for a score of 1, in nats per token


# First-order sums keep their sign over the calibration set; the absolute value is taken once, at the end.
# The first order predicts |σ Σ ∂L/∂σ|, the second order ½ σ² Σ (∂L/∂σ)²; both sums are over tokens. In the kfac basis
# the second order is ½ σ² for each token.
METRICS: dict[str, Metric] = {
    "taylor": Metric(lambda S, first, second: (S * first).abs(), "first", BASES, lambda tokens: 1 / tokens),
    "gradient": Metric(lambda S, first, second: first.abs(), "first"),
    "magnitude": Metric(lambda S, first, second: S.square(), "none", ("kfac",), lambda tokens: 0.5),
    "fisher": Metric(lambda S, first, second: S.square() * second, "second", BASES, lambda tokens: 0.5 / tokens),
}


def in_units_of_loss(basis: str, metric: str) -> bool:
    """Whether scores of different matrices can be compared: only predictions of the loss can."""
    return basis in METRICS[metric].loss_bases


def samples_labels(basis: str, metric: str) -> bool:
    """Whether gradients are those of labels drawn from the model's predictions.

    Their covariance is the Fisher information. Moments of ∂L/∂σ are of the observed labels: the mean gradient of drawn
    ones is 0.
    """
    return BASES[basis].outputs and METRICS[metric].moment == "none"


def nats_per_score(metric: str, tokens: int) -> float:
    """The loss that dropping a group with a score of 1 is predicted to add, in nats per token.

    Args:
        metric: a name from ``METRICS``, one that predicts a loss, as a global budget requires.
        tokens: how many the score is a sum over.
    """
    nats = METRICS[metric].nats
    assert nats is not None
    return nats(tokens)
