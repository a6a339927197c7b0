"""Tensor parallelism of transformers for low-rank layers: each is split like the dense layer that it replaces.

A column-wise split computes ``y = [U₁; U₂] (Vh x)``: a process has some rows of U and the whole Vh. A row-wise split
computes ``y = U (Vh₁ x₁) + U (Vh₂ x₂)``: a process has some columns of Vh and the whole U. The rank is never split.

Pivoted factors stay pivoted in a row-wise split, because they are linear in Vh too. A column-wise split expands them:
a process has some of the outputs, so only some entries of ``h`` are outputs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from grasp.errors import CheckpointError
from grasp.method.pivoting import factored
from grasp.model.lowrank_linear import LowRankLinear

# transformers' style of splitting a linear → the factor that every process has whole
WHOLE_FACTORS = {
    "colwise": "Vh",
    "colwise_rep": "Vh",
    "colwise_gather_output": "Vh",
    "rowwise": "U",
    "rowwise_rep": "U",
    "rowwise_split_input": "U",
}
# The style of a parameter that is not split, in transformers 5.17 and later.
_WHOLE = "replicated_with_grad_allreduce"
# Styles of a linear that every process has whole.
_UNSPLIT = ("replicate", _WHOLE, "mla_kv_a_proj", "all_reduce")


def keep_factors_whole_(plan: MutableMapping[str, str], paths: Iterable[str]) -> None:
    """Add the factors that must not be split to a plan.

    A style that cannot split a low-rank layer, such as ``"unit_colwise"``, is replaced by one that names the remedy and
    that transformers refuses when it splits the model, not when it loads it on one device.

    Args:
        plan: the model's mapping from modules and parameters to styles; ``*`` in a name means any layer index.
        paths: paths of the low-rank layers.
    """
    for module in {re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths}:
        style = plan.get(module)
        if style in WHOLE_FACTORS:
            plan[f"{module}.{WHOLE_FACTORS[style]}"] = _WHOLE
        elif style is not None and style not in _UNSPLIT:
            plan[module] = (
                f"{style}, which cannot split the low-rank layers {module}: give them 'colwise', 'rowwise' or "
                "'replicate' in DistributedConfig(tp_plan={...}), or load the model on one device"
            )


def is_split(layer: LowRankLinear) -> bool:
    """Whether each process has only a part of this layer."""
    return isinstance(layer.U, DTensor) or isinstance(layer.Vh, DTensor)


def connect_(name: str, layer: LowRankLinear) -> None:
    """Make a split layer all-reduce the gradient of its whole factor, since each process computes a part of it.

    A pivoted layer that is split by columns becomes a factored one. All processes must call this.

    Raises:
        CheckpointError: if the parts of the two factors do not fit, which a custom plan can cause, or the layer is
            pivoted and its U is not split into blocks of rows.
    """
    if layer.order is not None and isinstance(layer.U, DTensor):
        _factor_(name, layer, layer.U, layer.order)
    U, Vh = layer.U, layer.Vh
    left, right = (factor.to_local() if isinstance(factor, DTensor) else factor for factor in (U, Vh))
    if left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"the tensor-parallel plan gives each process {tuple(left.shape)} of {name}.U and {tuple(right.shape)} of "
            f"{name}.Vh; expected equal ranks. Load with tp_plan='auto', or give {name}.Vh (column-wise split) or "
            f"{name}.U (row-wise split) the style {_WHOLE!r}"
        )
    for split, whole in ((U, Vh), (Vh, U)):
        if isinstance(split, DTensor) and whole.requires_grad:
            whole.register_hook(_sum_over(split))


@torch.no_grad()
def _factor_(name: str, layer: LowRankLinear, C: DTensor, order: Tensor) -> None:
    """Write a pivoted layer, of whose C each process has some rows, as U, split in the same way, and Vh. Exact."""
    if not all(placement.is_shard(0) or placement.is_replicate() for placement in C.placements):
        raise CheckpointError(
            f"{name} is pivoted, and the tensor-parallel plan splits its U by {C.placements}; expected blocks of rows. "
            "Convert the checkpoint with `grasp convert --to factored`"
        )
    U = factored(C.full_tensor(), order)
    layer.set_factors_(distribute_tensor(U, C.device_mesh, C.placements, src_data_rank=None), layer.Vh.detach())


def _sum_over(split: DTensor) -> Callable[[Tensor], Tensor]:
    """A hook that sums a gradient over the processes that hold parts of ``split``."""
    mesh = split.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

    def total(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad

    return total
