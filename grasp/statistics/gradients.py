"""How much each singular group matters to the loss: calibration statistics → importance."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.errors import NonFiniteError
from grasp.method.ranks import Shape
from grasp.method.svd import SVD, decompose
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.partial_sums import PartialSums
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, Prefix, sweep, sweep_name
from grasp_kernels import singular_value_grad
from grasp_kernels.routes import Route, accumulate_weight_grad_, choose_route, contract_weight_grad


class FactoredSum:
    """``Σ colsum((d U) ⊙ (x Vhᵀ))``, call by call; cheap for few tokens, and needs the decomposition beforehand."""

    def __init__(self, target: Target) -> None:
        self._svd = decompose(dense_weight(target.module), target.name)
        self.tensor = torch.zeros_like(self._svd.S)
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count one call's tokens."""
        self.calls += 1
        U, S, Vh = self._svd
        self.tensor += singular_value_grad(call.x.to(S.dtype), call.grad_y.to(S.dtype), U, Vh).first

    def result(self) -> tuple[SVD, Tensor]:
        """The decomposition, and the sum for each of its groups, (groups,)."""
        return self._svd, self.tensor


class DenseSum:
    """``diag(Uᵀ (Σ dᵀ x) Vhᵀ)``: the weight's gradient G, as large as the weight, contracted once."""

    def __init__(self, target: Target) -> None:
        self._name, self._weight = target.name, dense_weight(target.module)
        dtype = torch.promote_types(self._weight.dtype, torch.float32)
        self.tensor = torch.zeros_like(self._weight, dtype=dtype, memory_format=torch.contiguous_format)
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count one call's tokens."""
        self.calls += 1
        accumulate_weight_grad_(self.tensor, call.x, call.grad_y)

    def result(self) -> tuple[SVD, Tensor]:
        """The decomposition, and the sum for each of its groups, (groups,)."""
        svd = decompose(self._weight, self._name)
        return svd, contract_weight_grad(self.tensor, svd.U, svd.Vh)


def gradient_sum(target: Target, tokens: int, *, shared: bool = False) -> FactoredSum | DenseSum:
    """The form that costs less for so many calibration tokens (``grasp_kernels.routes``).

    Processes that share the tokens take the weight's gradient: sums in two decompositions, each computed apart, may not
    be added up where singular values are close.
    """
    if shared:
        return DenseSum(target)
    return DenseSum(target) if gradient_route(dense_shape(target.module), tokens) == "dense" else FactoredSum(target)


def gradient_route(shape: Shape, tokens: int) -> Route:
    """How the gradient in all singular values of an (N, K) matrix is best summed over so many tokens."""
    n, k = shape
    return choose_route(tokens, n, k, min(n, k), plain_sum=True, spare_bytes=4 * n * k, fused=True)


def gather_gradients(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    targets: Collection[Target],
    prefix: Prefix,
    *,
    dtype: str | None = None,
    progress: Progress = no_progress,
    state: PartialSums | None = None,
    processes: Processes = ALONE,
) -> dict[Target, FactoredSum | DenseSum]:
    """Sum what the gradient of the negative log-likelihood in each target's singular values needs, in one sweep.

    Args:
        model: the model as it is by now; nothing of it is changed.
        batches: those that ``prefix`` was made from, this process's part of them.
        targets: linears of one or more layers.
        prefix: see ``capture_prefix``.
        dtype: run the model in it, see ``sweep``.
        progress: called after each batch.
        state: where the sums so far are kept, and taken up from.
        processes: those whose sums are added up.

    Returns:
        A sum for each target, in fp32 (fp64 for fp64); none for a target whose output does not reach the loss.

    Raises:
        NonFiniteError: if weights, the loss or a gradient are NaN or infinite.
        DistributedError: if another process fails.
    """
    tokens = sum(batch.num_tokens for batch in batches)
    sums = {target: gradient_sum(target, tokens, shared=processes.size > 1) for target in targets}
    state = PartialSums() if state is None else state
    step = sweep_name(targets)
    with processes.fail_together():
        start = state.restore_sums(sums, len(batches))
    if processes.sharded and processes.least(start) + processes.least(-start) != 0:  # a forward pass takes them all
        start = 0
        for total in sums.values():
            total.tensor.zero_()
            total.calls = 0

    def after(done: int) -> None:
        state.keep_sums(sums, done, len(batches))
        progress(step, done, len(batches))

    with processes.fail_together():
        sweep(
            *(model, batches, targets, prefix),
            lambda call: sums[call.target].add(call),
            dtype=dtype,
            start=start,
            after=after,
        )
    calls = torch.tensor([total.calls for total in sums.values()])
    processes.sum_([*(total.tensor for total in sums.values()), calls])
    for target, total in sums.items():
        if not torch.isfinite(total.tensor).all():
            raise NonFiniteError(
                f"the gradient in {target.name} is NaN or infinite; expected a finite one. "
                "Load the model in bfloat16 or float32."
            )
    return {target: total for (target, total), count in zip(sums.items(), calls.tolist(), strict=True) if count}
