"""Moments of the gradient in singular values, in any basis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import _require_finite
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, Prefix, sweep, sweep_name
from grasp_kernels import SingularValueGrad, singular_value_grad


class MomentSum:
    """First and second moment of the gradient in each group's singular value, for one linear in any basis.

    Args:
        svd: the groups: U (N, R) and Vh (R, K), orthogonal or not, fp32 (fp64 for fp64).
        second: square the gradient of each ``"token"`` or each ``"sample"``; ``None`` for no second moment.
    """

    def __init__(self, svd: SVD, second: Literal["token", "sample"] | None) -> None:
        self._svd, self._unit = svd, second
        self._first, self._second = torch.zeros_like(svd.S), torch.zeros_like(svd.S)
        self._samples: Tensor | None = None  # (B, R), of this batch: a linear may be called twice for a sample
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count one call's tokens."""
        self.calls += 1
        U, S, Vh = self._svd
        x, grad_y, by_sample = call.x.to(S.dtype), call.grad_y.to(S.dtype), self._unit == "sample"
        first, second = singular_value_grad(
            *(x, grad_y, U, Vh),
            cu_seqlens=call.cu_seqlens.to(x.device),
            per_sample=by_sample,
            second_moment="token" if self._unit == "token" else None,
        )
        if by_sample:
            self._samples = first if self._samples is None else self._samples + first
            return
        self._first += first
        if second is not None:
            self._second += second

    def end_batch(self) -> None:
        """Square what the batch's samples add up to."""
        if self._samples is not None:
            self._first += self._samples.sum(0)
            self._second += self._samples.square().sum(0)
            self._samples = None

    def share(self, processes: Processes) -> None:
        """Add up the sums of all processes."""
        calls = torch.tensor(self.calls)
        processes.sum_([self._first, self._second, calls])
        self.calls = int(calls)

    def result(self) -> SingularValueGrad:
        """The moments, (R,) each."""
        return SingularValueGrad(self._first, None if self._unit is None else self._second)


def basis_moments(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    decompositions: Mapping[Target, SVD],
    prefix: Prefix,
    *,
    second: Literal["token", "sample"] | None = None,
    dtype: str | None = None,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[Target, SingularValueGrad]:
    """Moments of the gradient in the singular values of any decomposition, ``Σ (uₖᵀ d)(xᵀ vₖ)``, in one sweep.

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from.
        decompositions: of each linear's weight, in whatever basis: U (N, R) and Vh (R, K).
        prefix: see ``capture_prefix``.
        second: also sum the squared gradient of each ``"token"`` or each ``"sample"``, which is one sequence.
        dtype: run the model in it, see ``sweep``.
        progress: called after each batch.
        processes: those whose sums are added up.

    Returns:
        ``first`` and ``second`` (``None`` unless asked for), (R,) in the dtype of the decomposition; none for a target
        whose output does not reach the loss.

    Raises:
        NonFiniteError: if the loss or a moment is NaN or infinite.
    """
    sums = {target: MomentSum(svd, second) for target, svd in decompositions.items()}
    step = f"moments, {sweep_name(decompositions)}"

    def after(done: int) -> None:
        for each in sums.values():
            each.end_batch()
        progress(step, done, len(batches))

    with processes.together():
        sweep(model, batches, sums, prefix, lambda call: sums[call.target].add(call), dtype=dtype, after=after)
    for total in sums.values():
        total.share(processes)
    moments = {target: each.result() for target, each in sums.items() if each.calls}
    for target, each in moments.items():
        _require_finite(target, "gradient", *each)
    return moments
