"""The singular value decomposition of a weight, plain or in a basis. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.method.blocks import BLOCK_ROWS, fp64_device, quadratic_form, row_blocks, to_double
from grasp.method.ranks import Shape

DAMPING = 1e-3  # of the mean of a covariance's diagonal, added to the diagonal
_SMALLEST = 1e-16  # of the largest squared singular value: smaller ones are rounding errors of fp64


class SVD(NamedTuple):
    """``weight = U @ diag(S) @ Vh``: U (N, R), S (min(N, K),) descending, Vh (R, K).

    R is min(N, K), or the number of groups that were asked for.
    """

    U: Tensor
    S: Tensor
    Vh: Tensor


class Projected(NamedTuple):
    """A covariance ``B = Σ d dᵀ`` of the N outputs of an (N, K) weight W, as far as ``decompose_in`` reads it."""

    gram: Tensor  # ``Wᵀ B W``, (K, K)
    squares: Tensor  # the diagonal of B, (N,)

    def diagonal(self) -> Tensor:
        """The diagonal of B, (N,)."""
        return self.squares


def decompose(weight: Tensor, name: str = "weight") -> SVD:
    """Singular value decomposition of an (N, K) weight, in fp32 (fp64 for fp64).

    Raises:
        NonFiniteError: if the weight has NaN or infinite entries; the message has their number.
    """
    if not torch.isfinite(weight).all():
        raise _non_finite(weight, name)
    return SVD(*torch.linalg.svd(weight.to(torch.promote_types(weight.dtype, torch.float32)), full_matrices=False))


def decompose_in(
    weight: Tensor,
    inputs: Tensor | None,
    outputs: Tensor | Projected | None,
    name: str = "weight",
    rank: int | None = None,
    *,
    tokens: int | None = None,
) -> SVD:
    """Decompose an (N, K) weight in the basis of its inputs and outputs: ``weight = U diag(S) Vh``.

    A and B are the covariances with ``shrinkage``. For N ≥ K and ``A = L Lᵀ``,
    ``Lᵀ Wᵀ B W L = V diag(S²) Vᵀ`` in fp64; ``Vh = Vᵀ L⁻¹``, and ``U = W L V diag(1 / S)``. N < K is the transposed
    case. So only the covariance of the smaller side is factorised, and the other one is read once, in blocks of rows.

    Args:
        weight: (N, K).
        inputs: ``Σ x xᵀ``, (K, K) symmetric, of which the lower triangle is read; ``None`` for the identity.
        outputs: ``Σ d dᵀ``, (N, N), likewise; ``Projected`` will do if N ≥ K.
        name: of the weight, for messages.
        rank: the number of groups, from the largest S on, of which U and Vh are returned; ``None`` for all.
        tokens: the covariances are sums over as many; ``None`` if they are exact means.

    Returns:
        In fp32 (fp64 for fp64), on the device of the weight. U and Vh are not orthogonal unless both covariances are
        ``None``. S has all groups, and its values below 1e-8 of the largest one are rounding errors. Truncation after
        R groups is optimal in ``‖B^½ (W − Ŵ) A^½‖``, which equals the square root of the sum of the dropped S².

    Raises:
        NonFiniteError: if the weight or a covariance has NaN or infinite entries.
        ValueError: if a covariance is 0.
    """
    if inputs is None and outputs is None:
        U, S, Vh = decompose(weight, name)
        return SVD(U[:, :rank], S, Vh[:rank])
    weight, groups = weight.detach(), min(weight.shape)
    rank = groups if rank is None else min(rank, groups)
    place = fp64_device(weight.device)
    if _is_tall(weight.shape):
        tall, small, large = weight, inputs, outputs
    else:
        assert not isinstance(outputs, Projected)  # the basis is that of the outputs
        tall, small, large = weight.mT, outputs, inputs
    S, vectors, factor = _eigenvectors(tall, small, large, tokens, place, name)
    dtype = torch.promote_types(weight.dtype, torch.float32)
    U, Vh = (weight.new_empty(size, dtype=dtype) for size in ((len(weight), rank), (rank, weight.shape[1])))
    left, right = (U, Vh) if tall is weight else (Vh.mT, U.mT)
    retained = vectors[:, groups - rank :]  # ascending
    _write_right(right, retained, factor)
    _write_left(left, retained, factor, tall, S[groups - rank :])
    return SVD(U, S.flip(0).to(weight.device, dtype), Vh)


def shrinkage(diagonal: Tensor, tokens: int | None, device: torch.device, name: str) -> tuple[float, float]:
    """What is added to the diagonal of ``Σ x xᵀ``, and what the sum is divided by, to give the covariance.

    Few tokens say little about most directions, so it is shrunk to its mean eigenvalue, as by one more token for each
    of its dimensions (docs/tried.md), and damped by ``DAMPING``.

    Args:
        diagonal: of the sum.
        tokens: the number of its terms; ``None`` for an exact covariance, which is only damped.
        device: where to compute in fp64.
        name: of the weight, for messages.

    Raises:
        NonFiniteError, ValueError: as ``decompose_in``.
    """
    mean = float(to_double(diagonal, device).mean())
    if not math.isfinite(mean):
        raise _non_finite_covariance(name)
    if not mean > 0:
        raise ValueError(
            f"a covariance of {name} is 0: the linear receives no tokens, or its output does not reach the loss"
        )
    if tokens is None:
        return DAMPING * mean, 1.0
    more = len(diagonal)
    return (more + DAMPING * (tokens + more)) / tokens * mean, float(tokens + more)


def decomposition_bytes(
    shape: Shape, *, inputs: bool, outputs: bool, projected: bool = False, rank: int | None = None, itemsize: int = 4
) -> int:
    """Peak memory of ``decompose_in`` beyond the weight and the covariances, in bytes; its result is counted.

    Args:
        shape: (N, K) of the weight.
        inputs: whether there is a covariance of the inputs.
        outputs: whether there is a covariance of the outputs.
        projected: whether it is ``Projected``.
        rank: the number of groups that are returned; ``None`` for all.
        itemsize: bytes of a number of the result.
    """
    d, m = sorted(shape)
    rank = d if rank is None else min(rank, d)
    result = itemsize * (rank * (m + d) + d)
    if not (inputs or outputs):
        return itemsize * (d * (m + d) + d + 2 * m * d + 4 * d * d)  # all groups, two copies, LAPACK's workspace
    small, large = (inputs, outputs and not projected) if _is_tall(shape) else (outputs, inputs)
    block, factor = min(BLOCK_ROWS, m), d * d if small else 0
    gram = d * d + block * d + (m * d + block * m if large else block * d)
    eigh = 3 * d * d + factor  # LAPACK's workspace has 2 d²
    writing = d * d + factor + block * (rank + d)
    return max(8 * gram, 8 * eigh, 8 * writing + result)


def decomposition_flops(
    shape: Shape, *, inputs: bool, outputs: bool, projected: bool = False, rank: int | None = None
) -> int:
    """FLOPs of ``decompose_in``; the arguments are those of ``decomposition_bytes``.

    An eigenvalue decomposition counts 14/3 d³: 4/3 to reduce it, 4/3 to divide and conquer, 2 to transform back.
    """
    d, m = sorted(shape)
    rank = d if rank is None else min(rank, d)
    if not (inputs or outputs):
        return 6 * m * d**2 + 20 * d**3  # Golub and Van Loan, Matrix Computations, 8.6
    small, large = (inputs, outputs and not projected) if _is_tall(shape) else (outputs, inputs)
    gram = 2 * m * d**2 + (m**2 * d if large else 0)
    eigh = 14 * d**3 // 3 + (d**3 // 3 + 2 * d**3 if small else 0)
    return gram + eigh + 2 * m * d * rank + (2 * d**2 * rank if small else 0)


def _is_tall(shape: Sequence[int]) -> bool:
    return shape[0] >= shape[1]


def _eigenvectors(
    weight: Tensor,
    small: Tensor | None,
    large: Tensor | Projected | None,
    tokens: int | None,
    device: torch.device,
    name: str,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """S (D,) and V (D, D) of an (M, D) weight, by ascending S, and L (D, D), all in fp64."""
    gram = _gram(weight, large, tokens, device, name)
    if not math.isfinite(float(gram.sum())):
        raise _non_finite(weight, name)
    factor = None if small is None else cholesky_factor(small, tokens, device, name)
    if factor is not None:
        _congruence_(gram, factor)
    values, vectors = _eigh_(gram)
    least = max(_SMALLEST * float(values[-1]), torch.finfo(values.dtype).tiny)
    return values.clamp_(min=least).sqrt_(), vectors, factor


def _write_right(out: Tensor, vectors: Tensor, factor: Tensor | None) -> None:
    """``out = Vᵀ L⁻¹``, (R, D), in descending order."""
    for rows in row_blocks(len(out)):
        block = vectors.mT[rows]
        if factor is not None:
            block = torch.linalg.solve_triangular(factor, block, upper=False, left=False)
        out[len(out) - rows.stop : len(out) - rows.start] = block.flip(0)


def _write_left(out: Tensor, vectors: Tensor, factor: Tensor | None, weight: Tensor, S: Tensor) -> None:
    """``out = W L V diag(1 / S)``, (M, R), in descending order; ``vectors`` becomes L V."""
    if factor is not None:
        for rows in reversed(row_blocks(len(vectors))):
            vectors[rows] = factor[rows, : rows.stop] @ vectors[: rows.stop]
    for rows in row_blocks(len(weight)):
        out[rows] = (to_double(weight[rows], vectors.device) @ vectors).div_(S).flip(1)


def _gram(
    weight: Tensor, outputs: Tensor | Projected | None, tokens: int | None, device: torch.device, name: str
) -> Tensor:
    """``Wᵀ B W`` of an (M, D) weight, (D, D) fp64."""
    floor, total = (1.0, 1.0) if outputs is None else shrinkage(outputs.diagonal(), tokens, device, name)
    if isinstance(outputs, Tensor):
        return quadratic_form(outputs, to_double(weight, device), floor).div_(total)
    gram = torch.zeros(weight.shape[1], weight.shape[1], dtype=torch.float64, device=device)
    for rows in row_blocks(len(weight)):
        block = to_double(weight[rows], device)
        gram.addmm_(block.mT, block)
    if outputs is not None:
        gram.mul_(floor).add_(outputs.gram.to(device)).div_(total)
    return gram


def cholesky_factor(covariance: Tensor, tokens: int | None, device: torch.device, name: str) -> Tensor:
    """The lower triangular L of a damped covariance over ``tokens``, fp64.

    A covariance of few tokens has eigenvalues of 0, or below 0 by rounding. If the damping does not make up for the
    rounding, the eigenvalue decomposition is used, and negative eigenvalues count as 0.
    """
    floor, total = shrinkage(covariance.diagonal(), tokens, device, name)

    def damped() -> Tensor:
        matrix = to_double(covariance, device, copy=True)
        matrix.diagonal().add_(floor)
        return matrix.div_(total)

    factor, failed = _cholesky_(damped())
    if failed and not math.isfinite(float(covariance.sum())):
        raise _non_finite_covariance(name)
    if failed:
        values, vectors = _eigh_(damped())
        factor, _ = _cholesky_((vectors * values.clamp_min(floor / total)) @ vectors.mT)
    return factor


def _congruence_(gram: Tensor, factor: Tensor) -> None:
    """``gram = Lᵀ gram L`` on and below the diagonal."""
    blocks = row_blocks(len(gram))
    for block in blocks:
        gram[:, block] = gram[:, block.start :] @ factor[block.start :, block]
    for block in blocks:
        gram[block, : block.stop] = factor[block.start :, block].mT @ gram[block.start :, : block.stop]


def _cholesky_(matrix: Tensor) -> tuple[Tensor, bool]:
    """The lower factor of a symmetric matrix, in its memory, and whether it failed."""
    columns = matrix.mT  # LAPACK works in place on columns
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
    return matrix, bool(info)


def _eigh_(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """The ascending eigenvalues of a symmetric matrix, and the eigenvectors in its memory; its lower half is read."""
    columns = matrix.mT  # LAPACK works in place on columns
    values = torch.empty(len(matrix), dtype=matrix.dtype, device=matrix.device)
    torch.linalg.eigh(columns, UPLO="U", out=(values, columns))
    return values, columns


def _non_finite(weight: Tensor, name: str) -> NonFiniteError:
    if not (bad := weight.numel() - int(torch.isfinite(weight).sum())):
        return _non_finite_covariance(name)
    return NonFiniteError(
        f"{name} has {bad} non-finite entries of {weight.numel()}; expected none. Load the model in a wider dtype, "
        "or repair the checkpoint."
    )


def _non_finite_covariance(name: str) -> NonFiniteError:
    return NonFiniteError(f"a covariance of {name} has NaN or infinite entries. Load the model in a wider dtype")
