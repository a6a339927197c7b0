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
from grasp.method.svd import SVD, decompose

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


def root(covariance: Tensor, *, damping: float = DAMPING) -> Tensor:
    """A root L of ``C + damping · mean(diag C) · 1 = L Lᵀ``: its Cholesky factor, (D, D), fp64, lower triangular.

    Any root makes the same cut, and this one takes a small part of the time of the symmetric one. A covariance of too
    few tokens has eigenvalues of 0, or below by rounding. Where the damping does not make up for the rounding, so that
    there is no Cholesky factor, the eigenvalues are taken, and those below 0 count as 0; a diagonal entry of L may be
    negative then.

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
    damped = (exact + exact.mT) / 2
    damped.diagonal().add_(floor)
    factor, failed = torch.linalg.cholesky_ex(damped)
    if not failed:
        return factor
    values, vectors = torch.linalg.eigh(damped)
    return torch.linalg.qr((vectors * values.clamp_min(floor).sqrt()).mT).R.mT


def decompose_in(weight: Tensor, inputs: Tensor | None, outputs: Tensor | None, name: str = "weight") -> SVD:
    """Decompose an (N, K) weight as its inputs and outputs see it: ``weight = U diag(S) Vh``.

    Args:
        weight: (N, K).
        inputs: ``root`` of A, (K, K), or ``None`` to take the inputs as white.
        outputs: ``root`` of B, (N, N), or ``None`` to take all outputs as equally important.
        name: of the weight, for messages.

    Returns:
        In fp32 (fp64 for fp64). U and Vh are not orthogonal unless both are ``None``; S descends. Cutting after R
        groups is optimal in ``‖B^½ (W − Ŵ) A^½‖``, which then is the root of the sum of the dropped S². A row of Vh,
        or a column of U, may be 0 where S is.

    Raises:
        NonFiniteError: if the weight has NaN or infinite entries.
    """
    if inputs is None and outputs is None:
        return decompose(weight, name)
    if not torch.isfinite(weight).all():
        raise NonFiniteError(f"{name} has non-finite entries; expected none. Load the model in a wider dtype")
    seen = weight.double()
    if inputs is not None:
        seen = seen @ inputs
    if outputs is not None:
        seen = outputs.mT @ seen
    U, S, Vh = _by_eigenvectors(seen)
    if inputs is not None:
        Vh = torch.linalg.solve_triangular(inputs, Vh, upper=False, left=False)
    if outputs is not None:
        U = torch.linalg.solve_triangular(outputs.mT, U, upper=True)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    return SVD(U.to(dtype), S.to(dtype), Vh.to(dtype))


def _by_eigenvectors(matrix: Tensor) -> SVD:
    """The singular groups of an fp64 matrix: right to 1e-8 of the largest value, where an SVD in fp32 is to 1e-7.

    It takes a fraction of the time: the eigenvectors V of ``Mᵀ M`` are one side, ``M V`` the other; or M's transpose.
    """
    if matrix.shape[0] < matrix.shape[1]:
        U, S, Vh = _by_eigenvectors(matrix.mT)
        return SVD(Vh.mT, S, U.mT)
    vectors = torch.linalg.eigh(matrix.mT @ matrix).eigenvectors.flip(1)
    scaled = matrix @ vectors  # U diag(S)
    S, order = torch.linalg.vector_norm(scaled, dim=0).sort(descending=True)
    return SVD(scaled[:, order] / S.clamp_min(torch.finfo(S.dtype).tiny), S, vectors[:, order].mT)
