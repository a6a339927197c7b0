"""Layers for the library ``kernels``, whose ``kernelize`` puts their ``forward`` in place of that of grasp's layers."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from .ops import lowrank_linear as _lowrank_linear

VERSION = 1  # the attributes that a ``forward`` here reads; also the version of the package on the Kernel Hub


class LowRankLinear(nn.Module):
    """The ``forward`` of ``grasp.LowRankLinear``, whose attributes it reads.

    It computes each layer alone, also where grasp computes those that share an input with one op.
    """

    can_torch_compile: ClassVar[bool] = True

    kernel_version: int
    backend: str
    U: Tensor
    Vh: Tensor
    bias: Tensor | None
    order: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features).

        Raises:
            RuntimeError: if the attributes are those of another version.
        """
        if self.kernel_version != VERSION:
            raise RuntimeError(
                f"this kernel package is version {VERSION}, and the installed grasp-llm needs version "
                f"{self.kernel_version}: load version={self.kernel_version}, or install the grasp-llm of this package"
            )
        return _lowrank_linear(x, self.U, None, self.Vh, self.bias, self.order, backend=self.backend)
