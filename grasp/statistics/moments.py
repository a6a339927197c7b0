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
        self._svd, self.calls = svd, 0
        self.moments = SingularValueGrad(torch.zeros_like(svd.S), torch.zeros_like(svd.S) if second else None)

    def add(self, call: Call) -> None:
        """Count the tokens of one call."""
        self.calls += 1
        U, S, Vh = self._svd
        second = None if self.moments.second is None else "token"
        added = singular_value_grad(call.x.to(S.dtype), call.grad_y.to(S.dtype), U, Vh, second_moment=second)
        for moment, tensor in zip(self.moments, added, strict=True):
            if moment is not None and tensor is not None:
                moment += tensor


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
        prefix: as ``layers``, ``progress`` and ``processes`` for ``gather_scores``.
        decompositions: of the weight of each linear, in any basis: U (N, R) and Vh (R, K).
        second: also sum the squared gradient of each token.

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
    calls = torch.tensor([total.calls for total in sums.values()])
    processes.sum_([calls, *(tensor for total in sums.values() for tensor in total.moments if tensor is not None)])
    moments = {target: total.moments for (target, total), n in zip(sums.items(), calls.tolist(), strict=True) if n}
    for target, moment in moments.items():
        require_finite(target, "gradient", *moment)
    return moments
