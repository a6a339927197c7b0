"""Singular groups and their importance, in any basis and by any metric, from one or two sweeps."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import NamedTuple

from torch import Tensor

from grasp.method.basis import BASES
from grasp.method.metrics import METRICS, Metric
from grasp.method.svd import SVD, decompose, decompose_in
from grasp.model.dense import dense_weight
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.gradients import DenseSum, FactoredSum, gather_gradients
from grasp.statistics.moments import basis_moments
from grasp.statistics.partial_sums import PartialSums
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Prefix


class Scored(NamedTuple):
    """The groups of one linear, ``weight = U diag(S) Vh``, with their importance, (groups,)."""

    svd: SVD
    importance: Tensor


Decompositions = Mapping[Target, Callable[[], SVD]]
Scores = Mapping[Target, Callable[[], Scored]]  # called one at a time: all decompositions together are large


def gather_scores(
    prefix: Prefix,
    targets: Collection[Target],
    *,
    basis: str,
    metric: str,
    progress: Progress = no_progress,
    state: PartialSums | None = None,
    processes: Processes = ALONE,
    running: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Scores:
    """Score the singular groups of linears on the model in its present state, in one sweep or two.

    The first sweep gathers the covariances that the basis needs. The second one gathers the moments in that basis, if
    the metric needs them. In the plain basis, a first-order metric takes one sweep for the gradients.

    Args:
        prefix: see ``sweep``; with the local batches of this process.
        targets: linears of one or more layers.
        basis: a name from ``BASES``.
        metric: a name from ``METRICS``.
        progress: called after each batch.
        state: where the sums of a plain first-order sweep are stored and resumed from.
        processes: the processes whose sums are added up.
        running: makes a context in which the sweeps run, if the model swept is not the one whose weights are
            decomposed. The plain basis does not support it.

    Returns:
        For each target a function that decomposes and scores it. A target whose output does not reach the loss is left
        out.

    Raises:
        NonFiniteError: if weights, the loss or a statistic are NaN or infinite.
        DistributedError: if another process fails.
    """
    row = METRICS[metric]
    if not BASES[basis].inputs and row.moment == "first":
        sums = gather_gradients(prefix, targets, progress=progress, state=state, processes=processes)
        return {target: partial(_by_gradient, total, row) for target, total in sums.items()}
    makers: Decompositions
    if not BASES[basis].inputs:
        makers = {target: partial(decompose, dense_weight(target.module), target.name) for target in targets}
    else:
        with running():
            covariances = gather_covariances(
                prefix, targets, outputs=BASES[basis].outputs, progress=progress, processes=processes
            )
        makers = decompositions_by(covariances)
    if row.moment == "none":
        return score_by_magnitude(makers)
    svds = {target: make() for target, make in makers.items()}
    with running():
        moments = basis_moments(prefix, svds, second=row.moment == "second", progress=progress, processes=processes)
    return {target: partial(_by_moments, svds[target], *moment, row) for target, moment in moments.items()}


def score_by_magnitude(decompositions: Decompositions) -> Scores:
    """Score groups by ``METRICS["magnitude"]``, which needs the singular values alone."""

    def score(make: Callable[[], SVD]) -> Scored:
        svd = make()
        return Scored(svd, METRICS["magnitude"].score(svd.S, svd.S, svd.S))

    return {target: partial(score, make) for target, make in decompositions.items()}


def _by_gradient(total: DenseSum | FactoredSum, metric: Metric) -> Scored:
    svd, grad = total.result()
    return Scored(svd, metric.score(svd.S, grad, grad))


def _by_moments(svd: SVD, first: Tensor, second: Tensor | None, metric: Metric) -> Scored:
    return Scored(svd, metric.score(svd.S, first, first if second is None else second))


def decompositions_by(covariances: Mapping[Target, Covariance]) -> Decompositions:
    """For each linear a function that decomposes it by its covariances: ``whitened`` without B, ``kfac`` with B."""

    def make(name: str, weight: Tensor, covariance: Covariance) -> SVD:
        return decompose_in(weight, covariance.A, covariance.B, name, tokens=covariance.tokens)

    # A sharded weight is gathered by all processes at once, so all weights are fetched here, not in ``make``.
    weights = {target: dense_weight(target.module) for target in covariances}
    return {t: partial(make, t.name, weights[t], covariance) for t, covariance in covariances.items()}
