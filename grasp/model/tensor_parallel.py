"""How a compressed model is split over processes by transformers: each low-rank layer as its dense one would be.

Split by columns, ``y = [U₁; U₂] (Vh x)``: a process has some rows of U and the whole of Vh. Split by rows,
``y = U (Vh₁ x₁) + U (Vh₂ x₂)``: it has some columns of Vh and the whole of U. Either way ``Vh x`` keeps its R entries.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, MutableMapping

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from grasp.errors import CheckpointError
from grasp.model.lowrank_linear import LowRankLinear

# transformers' style of splitting a linear → the factor that each process has whole
WHOLE_FACTORS = {
    "colwise": "Vh",
    "colwise_rep": "Vh",
    "colwise_gather_output": "Vh",
    "packed_colwise": "Vh",
    "rowwise": "U",
    "rowwise_rep": "U",
    "rowwise_split_input": "U",
}
# As the style of a parameter it leaves it whole, in every version of transformers from 5.17 on.
_WHOLE = "replicated_with_grad_allreduce"


def keep_factors_whole_(plan: MutableMapping[str, str], paths: Iterable[str]) -> None:
    """Add to a plan, a mapping of modules and parameters to styles, the factors that its styles must not split.

    Args:
        plan: of the model; a ``*`` in its names is any layer's number.
        paths: of the low-rank layers.
    """
    for module in {re.sub(r"\.\d+(?=\.|$)", ".*", path) for path in paths}:
        if (style := plan.get(module)) in WHOLE_FACTORS:
            plan[f"{module}.{WHOLE_FACTORS[style]}"] = _WHOLE


def is_split(layer: LowRankLinear) -> bool:
    """Whether a process has only a part of this layer."""
    return isinstance(layer.U, DTensor) or isinstance(layer.Vh, DTensor)


def connect_(name: str, layer: LowRankLinear) -> None:
    """Make a split layer add up the gradient of the factor that is whole, of which each process has a part.

    Raises:
        CheckpointError: if a plan of the user's own has split it in another way.
    """
    U, Vh = layer.U, layer.Vh
    left, right = (factor.to_local() if isinstance(factor, DTensor) else factor for factor in (U, Vh))
    if left.shape[1] != right.shape[0]:
        raise CheckpointError(
            f"the plan for tensor parallelism leaves each process {tuple(left.shape)} of {name}.U and "
            f"{tuple(right.shape)} of {name}.Vh, which have no rank in common; load with tp_plan='auto', or give "
            f"{name}.Vh (where {name} is split by columns) or {name}.U (by rows) the style {_WHOLE!r}"
        )
    for split, whole in ((U, Vh), (Vh, U)):
        if isinstance(split, DTensor) and whole.requires_grad:
            whole.register_hook(_sum_over(split))


def _sum_over(split: DTensor) -> Callable[[Tensor], Tensor]:
    """A hook that sums a gradient over the processes that share ``split``."""
    mesh = split.device_mesh
    group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")

    def total(grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad, group=group)
        return grad

    return total
