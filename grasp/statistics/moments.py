"""Moments of the gradient in the singular values of a decomposition, in any basis."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from grasp.method.svd import SVD
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import require_finite
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, Prefix, sweep, sweep_name
from grasp_kernels import SingularValueGrad, singular_value_grad


class MomentSum:
    """First and second moment of the gradient in the singular values of one linear.

    Args:
        svd: the groups: U (N, R) and Vh (R, K), orthogonal or not, fp32 (fp64 for fp64).
        second: also sum the squared gradient of each token.
    """

    def __init__(self, svd: SVD, *, second: bool) -> None:
        self._svd = svd
        self._first = torch.zeros_like(svd.S)
        self._second = torch.zeros_like(svd.S) if second else None
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count the tokens of one call."""
        self.calls += 1
        U, S, Vh = self._svd
        second_moment = None if self._second is None else "token"
        first, second = singular_value_grad(
            call.x.to(S.dtype), call.grad_y.to(S.dtype), U, Vh, second_moment=second_moment
        )
        self._first += first
        if self._second is not None and second is not None:
            self._second += second

    def all_reduce(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        calls = torch.tensor(self.calls)
        processes.sum_([tensor for tensor in (self._first, self._second, calls) if tensor is not None])
        self.calls = int(calls)

    def result(self) -> SingularValueGrad:
        """The moments, (R,) each."""
        return SingularValueGrad(self._first, self._second)


def basis_moments(
    prefix: Prefix,
    decompositions: Mapping[Target, SVD],
    *,
    layers: range | None = None,
    second: bool = False,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[Target, SingularValueGrad]:
    """Sum the gradients ``(uₖᵀ d)(xᵀ vₖ)`` in the singular values of any decomposition, in one sweep.

    Args:
        prefix: see ``sweep``; with the local batches of this process.
        decompositions: of the weight of each linear, in any basis: U (N, R) and Vh (R, K).
        layers: the layers to run, see ``sweep``.
        second: also sum the squared gradient of each token.
        progress: called after each batch.
        processes: the processes whose sums are added up.

    Returns:
        ``first`` and ``second`` (``None`` unless asked for), (R,) in the dtype of the decomposition. A target whose
        output does not reach the loss is left out.

    Raises:
        NonFiniteError: if the loss or a moment is NaN or infinite.
    """
    sums = {target: MomentSum(svd, second=second) for target, svd in decompositions.items()}
    step = f"moments, {sweep_name(decompositions)}"
    with processes.fail_together():
        sweep(
            *(prefix, sums, lambda call: sums[call.target].add(call)),
            layers=layers,
            after=lambda done: progress(step, done, len(prefix.batches)),
        )
    for total in sums.values():
        total.all_reduce(processes)
    moments = {target: total.result() for target, total in sums.items() if total.calls}
    for target, moment in moments.items():
        require_finite(target, "gradient", *moment)
    return moments
