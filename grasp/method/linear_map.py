"""The linear map that takes the place of decoder layers, by least squares. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.method.blocks import fp64_device, to_double

RIDGE = 1e-3  # fraction of the mean diagonal of Σ y yᵀ; pulls the map towards the identity


def linear_map(gram: Tensor, cross: Tensor) -> Tensor:
    """The T that minimises ``Σ ‖T y − z‖² + λ ‖T − 1‖²``, with λ = ``RIDGE`` · mean diagonal of ``Σ y yᵀ``.

    Args:
        gram: ``Σ y yᵀ``, (H, H).
        cross: ``Σ z yᵀ``, (H, H).

    Returns:
        (H, H) fp64.
    """
    device = fp64_device(gram.device)
    gram, cross = to_double(gram, device), to_double(cross, device)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype, device=device)
    return torch.linalg.solve(gram + ridge, cross + ridge, left=False)
