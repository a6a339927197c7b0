"""The singular value decomposition of a weight."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError


class SVD(NamedTuple):
    """``weight = U @ diag(S) @ Vh``: U (N, min(N, K)), S descending, Vh (min(N, K), K)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def decompose(weight: Tensor, name: str = "weight") -> SVD:
    """Singular value decomposition of an (N, K) weight, in fp32 (fp64 for fp64).

    Raises:
        NonFiniteError: if the weight has NaN or infinite entries; the message has their number.
    """
    finite = torch.isfinite(weight)
    if not finite.all():
        bad = weight.numel() - int(finite.sum())
        raise NonFiniteError(
            f"{name} has {bad} non-finite entries of {weight.numel()}; expected none. Load the model in a wider dtype, "
            "or repair the checkpoint."
        )
    return SVD(*torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False))
