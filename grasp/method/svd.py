"""The singular value decomposition of a weight, plain or in a basis. Pure functions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError

DAMPING = 1e-3  # of the mean of a covariance's diagonal, added to the diagonal


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


def cholesky_factor(covariance: Tensor, *, damping: float = DAMPING) -> Tensor:
    """The lower triangular L of ``C + damping · mean(diag C) · 1 = L Lᵀ``, (D, D), fp64.

    Any L with this product gives the same truncation. The Cholesky factor takes a small part of the time of the
    symmetric square root. A covariance of few tokens has eigenvalues of 0, or below 0 by rounding. If the damping does
    not make up for the rounding, the eigenvalue decomposition is used: negative eigenvalues count as 0, and a diagonal
    entry of L may then be negative.

    Args:
        covariance: symmetric, (D, D).
        damping: fraction of the mean of the diagonal that is added to the diagonal; above 0.

    Raises:
        NonFiniteError: if an entry is NaN or infinite.
        ValueError: if the covariance is 0, so that the damping is 0 as well.
    """
    if not torch.isfinite(covariance).all():
        raise NonFiniteError("a covariance has NaN or infinite entries; expected none. Load the model in a wider dtype")
    double = covariance.double()
    floor = damping * double.diagonal().mean()
    if not floor > 0:
        raise ValueError("a covariance is 0: the linear receives no tokens, or its output does not reach the loss")
    damped = (double + double.mT) / 2
    damped.diagonal().add_(floor)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(damped)
    return torch.linalg.qr((vectors * values.clamp_min(floor).sqrt()).mT).R.mT


def decompose_in(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, name: str = "weight") -> SVD:
    """Decompose an (N, K) weight in the basis of its inputs and outputs: ``weight = U diag(S) Vh``.

    Args:
        weight: (N, K).
        inputs: ``cholesky_factor`` of A, (K, K); ``None`` for the identity.
        outputs: ``cholesky_factor`` of B, (N, N); ``None`` for the identity.
        name: of the weight, for messages.

    Returns:
        In fp32 (fp64 for fp64). U and Vh are not orthogonal unless both factors are ``None``. S descends. Truncation
        after R groups is optimal in ``‖B^½ (W − Ŵ) A^½‖``, which equals the square root of the sum of the dropped S².
        A row of Vh or a column of U may be 0 where S is 0.

    Raises:
        NonFiniteError: if the weight has NaN or infinite entries.
    """
    if inputs is None and outputs is None:
        return decompose(weight, name)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{name} has non-finite entries; expected none. Load the model in a wider dtype")
    scaled = weight.double()
    if inputs is not None:
        scaled = scaled @ inputs
    if outputs is not None:
        scaled = outputs.mT @ scaled
    U, S, Vh = _by_eigenvectors(scaled)
    if inputs is not None:
        Vh = torch.linalg.solve_triangular(inputs, Vh, upper=False, left=False)
    if outputs is not None:
        U = torch.linalg.solve_triangular(outputs.mT, U, upper=True)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return SVD(U.to(dtype), S.to(dtype), Vh.to(dtype))


def _by_eigenvectors(matrix: Tensor) -> SVD:
    """The singular groups of an fp64 matrix M, from the eigenvectors V of ``Mᵀ M``: ``M V = U diag(S)``.

    Accurate to 1e-8 of the largest singular value, where an SVD in fp32 is to 1e-7, in a fraction of the time.
    """
    if matrix.shape[0] < matrix.shape[1]:
        U, S, Vh = _by_eigenvectors(matrix.mT)
        return SVD(Vh.mT, S, U.mT)
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors.flip(1)
    scaled = matrix @ vectors  # U diag(S)
    S, order = torch.linalg.vector_norm(scaled, dim=0).sort(descending=True)
    return SVD(scaled[:, order] / S.clamp_min(torch.finfo(S.dtype).tiny), S, vectors[:, order].mT)
