"""Matrices for an optimizer: in fp32, since its steps are smaller than the precision of bf16, and in units.

Adam changes all entries of a parameter by about the same amount. The units of an entry are the root mean squares of its
row and of its column, over that of the matrix, as in Adafactor (arXiv 1804.04235): then a step changes all rows and
columns by about the same fraction, small ones too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_SMALLEST = 1e-3  # root mean square of a row or column over that of all, and of a matrix of zeros: they are trained too


class Masters:
    """The parameters of the optimizer: factors in their units, in fp32, or fp64 if they are.

    Attributes:
        values: by the names of the factors.
    """

    def __init__(self, factors: Mapping[str, nn.Parameter]) -> None:
        self.factors = factors
        self._units = {name: units(factor) for name, factor in factors.items()}
        self.values = {name: nn.Parameter(self._divided(name, factor.detach())) for name, factor in factors.items()}

    def _divided(self, name: str, factor: Tensor) -> Tensor:
        rows, columns = self._units[name]
        return factor / rows / columns

    def _multiplied(self, name: str, tensor: Tensor) -> Tensor:
        rows, columns = self._units[name]
        return tensor * rows * columns

    def take_gradients_(self) -> None:
        """Move the gradients of the model's factors to the optimizer's parameters, and add them there."""
        for name, factor in self.factors.items():
            if factor.grad is None:
                continue
            grad, master = self._multiplied(name, factor.grad), self.values[name]
            if master.grad is None:
                master.grad = grad
            else:
                master.grad += grad
            factor.grad = None

    @torch.no_grad()
    def write_back_(self) -> None:
        """Set the factors to the optimizer's parameters, in the dtype of the model."""
        for name, factor in self.factors.items():
            factor.copy_(self._multiplied(name, self.values[name]))


@torch.no_grad()
def units(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The units of the rows, (N, 1), and of the columns, (1, K), of a matrix; an entry has the product of its two.

    All entries of a vector have the same units.

    Example:
        >>> rows, columns = units(torch.tensor([[3.0, 0.03], [4.0, 0.04]]))
        >>> (rows * columns).round(decimals=2)
        tensor([[3.0000, 0.0300],
                [4.0000, 0.0400]])
    """
    squares = matrix.to(torch.promote_types(matrix.dtype, torch.float32)).square()
    if not squares.any():
        squares = torch.full_like(squares, _SMALLEST**2)
    mean = squares.mean()
    rows, columns = (squares.mean(dim, keepdim=True) / mean for dim in (-1, 0))
    return (rows.clamp_min(_SMALLEST**2) * mean).sqrt(), columns.clamp_min(_SMALLEST**2).sqrt()
