"""What a weight is decomposed in: plainly, or as its inputs and output gradients see it. Pure functions.

With ``A = Σ x xᵀ / T`` and ``B = Σ d dᵀ / T`` over the calibration tokens, x a linear's input and d the gradient of the
summed loss in its output, cutting the decomposition of

* ``W`` changes the weight least (GRASP, arXiv 2501.00339);
* ``W A^½`` changes the outputs least (SVD-LLM, arXiv 2403.07378): ``‖(W − Ŵ) A^½‖``;
* ``B^½ W A^½`` changes the loss least, as the Kronecker-factored empirical Fisher estimates it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.modules import SVD, decompose

DAMPING = 1e-3  # of the mean of a covariance's diagonal, added to the diagonal


class Basis(NamedTuple):
    """How to decompose an (N, K) weight, and which covariances that takes."""

    inputs: bool  # A, (K, K)
    outputs: bool  # B, (N, N)


BASES: dict[str, Basis] = {
    "plain": Basis(inputs=False, outputs=False),
    "whitened": Basis(inputs=True, outputs=False),
    "kfac": Basis(inputs=True, outputs=True),
}


class Roots(NamedTuple):
    """The symmetric square root of a damped covariance, and its inverse, fp64."""

    root: Tensor
    inverse: Tensor


def roots(covariance: Tensor, *, damping: float = DAMPING) -> Roots:
    """``(C + damping · mean(diag C) · 1)^±½`` by an eigen-decomposition in fp64.

    A covariance of too few tokens has eigenvalues of 0, or below by rounding: those count as 0 before the damping.

    Args:
        covariance: symmetric, (D, D).
        damping: share of the mean of the diagonal; above 0.

    Raises:
        NonFiniteError: if an entry is NaN or infinite.
        ValueError: if the covariance is 0, so that there is nothing to damp with.
    """
    if not torch.isfinite(covariance).all():
        raise NonFiniteError("a covariance has NaN or infinite entries; expected none. Load the model in a wider dtype")
    exact = covariance.double()
    floor = damping * exact.diagonal().mean()
    if not floor > 0:
        raise ValueError("a covariance is 0: this linear is given no tokens, or its output does not reach the loss")
    values, vectors = torch.linalg.eigh((exact + exact.mT) / 2)
    root = (values.clamp_min(0) + floor).sqrt()
    return Roots((vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT)


def decompose_in(weight: Tensor, inputs: Roots | None, outputs: Roots | None, name: str = "weight") -> SVD:
    """Decompose an (N, K) weight as its inputs and outputs see it: ``weight = U diag(S) Vh``.

    Args:
        weight: (N, K).
        inputs: roots of A, (K, K), or ``None`` to take the inputs as white.
        outputs: roots of B, (N, N), or ``None`` to take all outputs as equally important.
        name: of the weight, for messages.

    Returns:
        In fp32 (fp64 for fp64). U and Vh are not orthogonal unless both roots are ``None``; S descends. Cutting after
        R groups is optimal in ``‖B^½ (W − Ŵ) A^½‖``, which then is the root of the sum of the dropped S².

    Raises:
        NonFiniteError: if the weight has NaN or infinite entries.
    """
    if inputs is None and outputs is None:
        return decompose(weight, name)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    seen = weight.double()
    if inputs is not None:
        seen = seen @ inputs.root
    if outputs is not None:
        seen = outputs.root @ seen
    U, S, Vh = decompose(seen.to(dtype), name)
    if inputs is not None:
        Vh = (Vh.double() @ inputs.inverse).to(dtype)
    if outputs is not None:
        U = (outputs.inverse @ U.double()).to(dtype)
    return SVD(U, S, Vh)
