"""Regularised least squares. A pure function."""

from __future__ import annotations

import torch
from torch import Tensor

RIDGE = 1e-3  # of the mean diagonal of the projected inputs' covariance: how strongly U is held at its value


def least_squares(U: Tensor, Vh: Tensor, weight: Tensor, cross: Tensor, inputs: Tensor) -> Tensor:
    """The U that minimises ``Σ ‖W x − U Vh x̂‖² + λ ‖U − U₀‖²``, (N, R) in the dtype of ``U``; solved in fp64.

    Args:
        U: U₀, (N, R).
        Vh: (R, K).
        weight: W, (N, K).
        cross: ``Σ x x̂ᵀ``, (K, K): inputs in the dense model by those in the compressed one.
        inputs: ``Σ x̂ x̂ᵀ``, (K, K).
    """
    left, right, exact = U.double(), Vh.double(), weight.double()
    gram = right @ inputs.double() @ right.mT
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    wanted = exact @ cross.double() @ right.mT + left @ ridge
    return torch.linalg.solve(gram + ridge, wanted, left=False).to(U.dtype)
