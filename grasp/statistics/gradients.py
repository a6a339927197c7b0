"""The gradient of the loss in the singular values of linears, summed over the calibration tokens."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from grasp.method.ranks import Shape
from grasp.method.svd import SVD, decompose
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.offload import execution_device
from grasp.model.targets import Target
from grasp.progress import Progress, no_progress
from grasp.statistics.covariance import require_finite
from grasp.statistics.moments import MomentSum
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import Call, Prefix, sweep, sweep_name
from grasp_kernels.routes import accumulate_weight_grad_, contract_weight_grad, dense_flops, factored_flops


class FactoredSum(MomentSum):
    """``Σ colsum((d U) ⊙ (x Vhᵀ))``, call by call: cheap for few tokens. The weight is decomposed first."""

    def __init__(self, target: Target) -> None:
        super().__init__(decompose(dense_weight(target.module), target.name), second=False)
        self.tensor = self.moments.first

    def result(self, weight: Tensor) -> tuple[SVD, Tensor]:
        """The decomposition of the weight, and the sum for each of its groups, (groups,)."""
        return self._svd, self.tensor


class DenseSum:
    """``diag(Uᵀ (Σ dᵀ x) Vhᵀ)``: the gradient of the weight is summed, then contracted once."""

    def __init__(self, target: Target) -> None:
        self._name = target.name
        dtype = torch.promote_types(target.module.weight.dtype, torch.float32)
        self.tensor = torch.zeros(dense_shape(target.module), dtype=dtype, device=execution_device(target.module))
        self.calls = 0

    def add(self, call: Call) -> None:
        """Count the tokens of one call."""
        self.calls += 1
        accumulate_weight_grad_(self.tensor, call.x, call.grad_y)

    def result(self, weight: Tensor) -> tuple[SVD, Tensor]:
        """The decomposition of the weight, and the sum for each of its groups, (groups,)."""
        svd = decompose(weight, self._name)
        return svd, contract_weight_grad(self.tensor, svd.U, svd.Vh)


GradientSum = FactoredSum | DenseSum


class PartialSums:
    """Stores nothing, so every sweep starts at its first batch. ``grasp.checkpoint.run_state`` stores the sums."""

    def restore_sums(self, sums: Mapping[Target, GradientSum]) -> int:
        """Set the sums of a sweep to the stored ones; the number of batches that they hold."""
        return 0

    def store_sums(self, sums: Mapping[Target, GradientSum], done: int, batches: int) -> None:
        """Store the sums of a sweep, which hold ``done`` of ``batches`` batches: twice a minute, and at its end."""


def dense_is_cheaper(shape: Shape, tokens: int) -> bool:
    """Whether ``DenseSum`` takes fewer FLOPs for all singular values of an (N, K) matrix and a number of tokens."""
    work = (tokens, *shape, min(shape))
    return dense_flops(*work) < factored_flops(*work)


def gather_gradients(
    prefix: Prefix,
    targets: Collection[Target],
    *,
    layers: range | None = None,
    progress: Progress = no_progress,
    state: PartialSums | None = None,
    processes: Processes = ALONE,
    tokens: int | None = None,
) -> dict[Target, GradientSum]:
    """Sum the gradient of the negative log-likelihood in the singular values of each target, in one sweep.

    Arguments are those of ``gather_scores``. ``tokens``, by default those of the batches, decide how sums are made.

    Returns:
        A sum for each target, in fp32 (fp64 for fp64). A target whose output does not reach the loss is left out.

    Raises:
        NonFiniteError: if weights, the loss or a gradient are NaN or infinite.
        DistributedError: if another process fails.
    """
    count = len(prefix.batches)
    tokens = sum(batch.num_tokens for batch in prefix.batches) if tokens is None else tokens
    # Processes that share the tokens use ``DenseSum``. Each would decompose for itself, and the groups of two
    # decompositions can differ where singular values are close, so their sums cannot be added up.
    shared = processes.size > 1
    sums: dict[Target, GradientSum] = {
        target: (DenseSum if shared or dense_is_cheaper(dense_shape(target.module), tokens) else FactoredSum)(target)
        for target in targets
    }
    state = PartialSums() if state is None else state
    step = sweep_name(targets)
    start = _restore(state, sums, processes)

    def after(done: int) -> None:
        state.store_sums(sums, done, count)
        progress(step, done, count)

    with processes.fail_together():
        sweep(*(prefix, targets, lambda call: sums[call.target].add(call)), layers=layers, start=start, after=after)
    calls = torch.tensor([total.calls for total in sums.values()])
    processes.sum_([*(total.tensor for total in sums.values()), calls])
    for target, total in sums.items():
        require_finite(target, "gradient", total.tensor)
    return {target: total for (target, total), count in zip(sums.items(), calls.tolist(), strict=True) if count}


def _restore(state: PartialSums, sums: Mapping[Target, GradientSum], processes: Processes) -> int:
    """Resume the stored sums; the number of batches that they hold.

    If the model is sharded, all processes run every forward pass together, so they start at the same batch.
    """
    with processes.fail_together():
        start = state.restore_sums(sums)
    if not processes.sharded or processes.least(start) == -processes.least(-start):
        return start
    for total in sums.values():
        total.tensor.zero_()
        total.calls = 0
    return 0
