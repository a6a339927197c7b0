"""Dense linears through the CPU kernel of the low-rank linears, which reads weights faster than PyTorch's product."""

from __future__ import annotations

import math

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_exporting

from grasp.errors import UnsupportedModelError
from grasp_kernels import lowrank_linear
from grasp_kernels.dispatch import CPU_ROWS, backend_missing


class KernelLinear(nn.Linear):
    """An ``nn.Linear`` whose calls with few rows on a CPU run in the kernel of ``lowrank_linear``.

    A dense weight is pivoted factors of full rank: Vh is the weight, and no other rows are left for U. Calls that
    record a gradient and calls with more than ``CPU_ROWS`` rows take PyTorch's product. Parameters and ``state_dict``
    are those of ``nn.Linear``. See ``use_kernel_``.
    """

    others: Tensor  # U, (0, N)
    order: Tensor  # (N,) int32

    @classmethod
    def convert_(cls, linear: nn.Linear) -> None:
        """Change the class of a linear; the object stays, with its parameters and hooks."""
        linear.__class__ = cls
        rows, weight = linear.out_features, linear.weight
        linear.register_buffer("others", weight.new_empty(0, rows), persistent=False)
        order = torch.arange(rows, dtype=torch.int32, device=weight.device)
        linear.register_buffer("order", order, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        rows = math.inf if is_exporting() else CPU_ROWS.get(x.dtype, 0)  # then the op chooses when it is called
        if not x.is_cpu or is_grad_enabled() or x.numel() > self.in_features * rows:
            return super().forward(x)
        others, order, outputs = self.others, self.order, len(self.weight)
        if others.dtype != x.dtype or len(order) != outputs:  # the weight is another by now
            others, order = x.new_empty(0, outputs), torch.arange(outputs, dtype=torch.int32)
        return lowrank_linear(x, others, None, self.weight, self.bias, order)


def use_kernel_(model: nn.Module) -> int:
    """Make every ``nn.Linear`` of a model a ``KernelLinear``; subclasses of ``nn.Linear`` are left as they are.

    Args:
        model: on the CPU.

    Returns:
        The number of linears.

    Raises:
        UnsupportedModelError: if the CPU kernels are missing, or the model has no linear on the CPU.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> use_kernel_(model)
        2
        >>> model[0]
        KernelLinear(in_features=8, out_features=8, bias=True)
    """
    if (reason := backend_missing("cpu")) is not None:
        raise UnsupportedModelError(f"dense linears need the CPU kernels: {reason}")
    linears = [module for module in model.modules() if type(module) is nn.Linear and module.weight.is_cpu]
    if not linears:
        raise UnsupportedModelError("the model has no nn.Linear on the CPU")
    for linear in linears:
        KernelLinear.convert_(linear)
    return len(linears)
