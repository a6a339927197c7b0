"""Singular groups and their importance, in whichever basis and by whichever metric: the sweeps that takes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Literal, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from grasp.method.basis import BASES, DAMPING, decompose_in, root
from grasp.method.metrics import METRICS, Metric
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
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


Scores = Mapping[Target, Callable[[], Scored]]  # decompositions are large: each is made when it is asked for


def gather_scores(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Collection[Target],
    prefix: Prefix,
    *,
    basis: str,
    metric: str,
    dtype: str | None = None,
    progress: Progress = no_progress,
    state: PartialSums | None = None,
    processes: Processes = ALONE,
    running: Callable[[], AbstractContextManager[object]] = nullcontext,
) -> Scores:
    """Score the singular groups of linears on the model as it is by now: one sweep, or two.

    A first sweep gathers the covariances that the basis needs, or for the plain basis and a first-order metric the
    gradients at once; a second one the moments in that basis, where the metric needs some.

    Args:
        model: nothing of it is changed.
        batches: those that ``prefix`` was made from, this process's part of them.
        targets: linears of one or more layers.
        prefix: see ``capture_prefix``.
        basis: a name from ``BASES``.
        metric: a name from ``METRICS``.
        dtype: run the model in it, see ``sweep``.
        progress: called after each batch.
        state: where the sums of a plain first-order sweep are kept, and taken up from.
        processes: those whose sums are added up.
        running: gives a context in which the model is swept, where that is to be another one than the weights that are
            decomposed; not with the plain basis.

    Returns:
        For each target what decomposes and scores it; none for a target whose output does not reach the loss.

    Raises:
        NonFiniteError: if weights, the loss or a statistic are NaN or infinite.
        DistributedError: if another process fails.
    """
    form, how = BASES[basis], METRICS[metric]
    if not form.inputs and how.moment == "first":
        sums = gather_gradients(
            *(model, batches, targets, prefix), dtype=dtype, progress=progress, state=state, processes=processes
        )
        return {target: partial(_by_gradient, total, how) for target, total in sums.items()}
    decompositions: Mapping[Target, Callable[[], SVD]]
    if form.inputs:
        with running():
            covariances = gather_covariances(
                *(model, batches, targets, prefix),
                outputs=form.outputs,
                dtype=dtype,
                progress=progress,
                processes=processes,
            )
        decompositions = decompositions_by(covariances)
    else:
        weights = {target: dense_weight(target.module) for target in targets}
        decompositions = {t: partial(decompose_in, weight, None, None, t.name) for t, weight in weights.items()}
    if how.moment == "none":
        return {target: partial(_by_magnitude, make, how) for target, make in decompositions.items()}
    svds = {target: make() for target, make in decompositions.items()}
    second: Literal["token"] | None = "token" if how.moment == "second" else None
    with running():
        moments = basis_moments(
            *(model, batches, svds, prefix), second=second, dtype=dtype, progress=progress, processes=processes
        )
    return {
        target: partial(_by_moments, svds[target], *(moment.first, moment.second), how)
        for target, moment in moments.items()
    }


def _by_gradient(total: DenseSum | FactoredSum, metric: Metric) -> Scored:
    svd, grad = total.result()
    return Scored(svd, metric.score(svd.S, grad, grad))


def _by_magnitude(make: Callable[[], SVD], metric: Metric) -> Scored:
    svd = make()
    return Scored(svd, metric.score(svd.S, svd.S, svd.S))


def _by_moments(svd: SVD, first: Tensor, second: Tensor | None, metric: Metric) -> Scored:
    return Scored(svd, metric.score(svd.S, first, first if second is None else second))


def decompositions_by(covariances: Mapping[Target, Covariance]) -> Mapping[Target, Callable[[], SVD]]:
    """What decomposes each linear as its covariances see it: ``whitened`` where they have no B, ``kfac`` where they do.

    The root of an input's covariance is taken once for all linears that share it, if they come one by one.
    """
    latest: list[tuple[Tensor, Tensor]] = []

    def inputs(covariance: Covariance) -> Tensor:
        assert covariance.A is not None
        if not latest or latest[0][0] is not covariance.A:
            latest[:] = [(covariance.A, root(covariance.A / covariance.tokens, damping=DAMPING))]
        return latest[0][1]

    def make(name: str, weight: Tensor, covariance: Covariance) -> SVD:
        outputs = None if covariance.B is None else root(covariance.B / covariance.tokens, damping=DAMPING)
        return decompose_in(weight, inputs(covariance), outputs, name)

    # All processes ask for all weights here, which sharded ones need; each makes some of the decompositions only.
    weights = {target: dense_weight(target.module) for target in covariances}
    return {t: partial(make, t.name, weights[t], covariance) for t, covariance in covariances.items()}
