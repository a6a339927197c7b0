"""Singular groups and their importance, in any basis and by any metric, from one or two sweeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NamedTuple

from torch import Tensor

from grasp.method.basis import BASES
from grasp.method.metrics import METRICS, Metric
from grasp.method.svd import SVD, decompose_in
from grasp.model.dense import dense_weight
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.gradients import GradientSum, PartialSums, gather_gradients
from grasp.statistics.moments import basis_moments
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Prefix


class Scored(NamedTuple):
    """The groups of one linear, ``weight = U diag(S) Vh``, with their importance, (groups,).

    U and Vh may have the most important groups only; S has all. The covariances are there if the basis has them and no
    moments are gathered.
    """

    svd: SVD
    importance: Tensor
    covariance: Covariance | None = None


# The weight, (N, K), and how many of the most important groups are needed, ``None`` for all → the groups.
Score = Callable[[Tensor, "int | None"], Scored]
Scores = Mapping[Target, Score]  # called one at a time: all decompositions together are large


def gather_scores(
    prefix: Prefix,
    targets: Collection[Target],
    *,
    basis: str,
    metric: str,
    layers: range | None = None,
    projected: Collection[Target] = (),
    progress: Progress = no_progress,
    state: PartialSums | None = None,
    processes: Processes = ALONE,
) -> Scores:
    """Score the singular groups of linears on the model in its present state, in one sweep or two.

    The first sweep gathers the covariances that the basis needs. The second one gathers the moments in that basis, if
    the metric needs them. In the plain basis, a first-order metric takes one sweep for the gradients.

    Args:
        prefix: see ``sweep``; with the local batches of this process.
        targets: linears of one or more layers.
        basis: a name from ``BASES``.
        metric: a name from ``METRICS``.
        layers: the layers to run, see ``sweep``.
        projected: see ``gather_covariances``.
        progress: called after each batch.
        state: where the sums of a plain first-order sweep are stored and resumed from.
        processes: the processes whose sums are added up.

    Returns:
        For each target a function that decomposes its weight and scores the groups; by covariances alone, only for the
        targets of this process (``Processes.owner``). A target whose output does not reach the loss is left out.

    Raises:
        NonFiniteError: if weights, the loss or a statistic are NaN or infinite.
        DistributedError: if another process fails.
    """
    row = METRICS[metric]
    shared = {"layers": layers, "progress": progress, "processes": processes}
    if not BASES[basis].inputs and row.moment == "first":
        sums = gather_gradients(prefix, targets, state=state, **shared)  # type: ignore[arg-type]
        return {target: partial(_by_gradient, total, row) for target, total in sums.items()}
    covariances: Mapping[Target, Covariance | None] = dict.fromkeys(targets)
    if BASES[basis].inputs:
        covariances = gather_covariances(
            *(prefix, targets),
            outputs=BASES[basis].outputs,
            projected=projected,
            owned=row.moment == "none",  # otherwise the moments of all groups are summed in all processes
            **shared,  # type: ignore[arg-type]
        )
    if row.moment == "none":
        return {target: partial(_by_magnitude, target.name, found, row) for target, found in covariances.items()}
    svds = {target: _decompose(target.name, c, dense_weight(target.module)) for target, c in covariances.items()}
    moments = basis_moments(prefix, svds, second=row.moment == "second", **shared)  # type: ignore[arg-type]
    return {target: partial(_by_moments, svds[target], *moment, row) for target, moment in moments.items()}


def _decompose(name: str, covariance: Covariance | None, weight: Tensor, rank: int | None = None) -> SVD:
    A, B, tokens = covariance or (None, None, None)
    return decompose_in(weight, A, B, name, rank, tokens=tokens)


def _by_magnitude(name: str, covariance: Covariance | None, metric: Metric, weight: Tensor, rank: int | None) -> Scored:
    svd = _decompose(name, covariance, weight, rank)
    return Scored(svd, metric.score(svd.S, svd.S, svd.S), covariance)


def _by_gradient(total: GradientSum, metric: Metric, weight: Tensor, rank: int | None) -> Scored:
    svd, grad = total.result(weight)
    return Scored(svd, metric.score(svd.S, grad, grad))


def _by_moments(
    svd: SVD, first: Tensor, second: Tensor | None, metric: Metric, weight: Tensor, rank: int | None
) -> Scored:
    return Scored(svd, metric.score(svd.S, first, first if second is None else second))
