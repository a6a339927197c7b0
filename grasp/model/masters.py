"""Parameters for an optimizer whose steps are smaller than the precision of the model's dtype."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

_WIDE = (torch.float32, torch.float64)


class Masters:
    """The parameters of the optimizer: fp32 and fp64 factors themselves, and fp32 copies of narrower ones."""

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        self.factors = factors
        self.values = {
            name: factor if factor.dtype in _WIDE else nn.Parameter(factor.detach().float())
            for name, factor in factors.items()
        }

    def take_gradients_(self) -> None:
        """Move the gradients of the model's factors to the fp32 copies, and add them there."""
        for name, factor in self.factors.items():
            master = self.values[name]
            if master is factor or factor.grad is None:
                continue
            if master.grad is None:
                master.grad = factor.grad.float()
            else:
                master.grad += factor.grad
            factor.grad = None

    @torch.no_grad()
    def write_back_(self) -> None:
        """Round the copies to the dtype of the model."""
        for name, factor in self.factors.items():
            if self.values[name] is not factor:
                factor.copy_(self.values[name])
