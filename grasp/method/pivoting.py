"""Pivoted factors: a rank-R matrix as R of its rows and the coefficients of the others in them. Pure functions."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import NonFiniteError
from grasp.method.blocks import fp64_device, row_blocks, to_double
from grasp.method.ranks import Shape

# Of C, in absolute value. On factors of SmolLM2 rounding to bf16 costs 1.2 to 1.6 times as much with 2; the exchanges
# take less time than the elimination before them.
LARGEST_COEFFICIENT = 1.05
LARGEST_GROWTH = 16.0  # of rounding errors, at most; in bf16 the weight then has a relative error of about 0.03


class Pivoted(NamedTuple):
    """``weight[pivots] = Vp`` and ``weight[other rows, ascending] = C @ Vp``, in R(N + K − R) numbers.

    So ``h = Vp @ x`` is a part of the output ``y``, and ``C @ h`` is the rest of it.
    """

    pivots: Tensor  # (R,) int64, distinct and ascending
    C: Tensor  # (N − R, R); no entry is above ``LARGEST_COEFFICIENT`` in absolute value
    Vp: Tensor  # (R, K)
    growth: float  # see ``rounding_growth``


def pivot(U: Tensor, Vh: Tensor) -> Pivoted:
    """Write ``weight = U @ Vh`` in pivoted form. Exact but for rounding; solved in fp64.

    The pivots are those of Gaussian elimination with row exchanges. Then rows are exchanged until no coefficient is
    above ``LARGEST_COEFFICIENT``; an exchange multiplies the volume of ``U[pivots]`` by the coefficient. So the choice
    is a strong rank-revealing one (Gu and Eisenstat 1996, doi:10.1137/0917055), as in maxvol (Goreinov et al. 2010).
    C does not depend on the scale of the columns of U, which may be linearly dependent. Source of the form: arXiv
    2501.19090.

    Args:
        U: (N, R), floating point, R at most N.
        Vh: (R, K).

    Returns:
        C and Vp on the device of ``U``, in fp32 (fp64 for fp64).

    Raises:
        NonFiniteError: if ``U`` or ``Vh`` has NaN or infinite entries.
        ValueError: if their ranks differ, or the rank is 0 or above N.

    Example:
        >>> U, Vh = torch.randn(6, 2), torch.randn(2, 5)
        >>> pivots, C, Vp, _ = pivot(U, Vh)
        >>> torch.allclose((U @ Vh)[other_rows(pivots, 6)], C @ Vp, atol=1e-5)
        True
    """
    size, rank = U.shape
    if len(Vh) != rank or not 1 <= rank <= size:
        raise ValueError(f"expected U (N, R) and Vh (R, K) with 1 ≤ R ≤ N, got {tuple(U.shape)} and {tuple(Vh.shape)}")
    if not (U.isfinite().all() and Vh.isfinite().all()):
        raise NonFiniteError("U or Vh has NaN or infinite entries; expected finite factors")
    dtype, place = torch.promote_types(U.dtype, torch.float32), fp64_device(U.device)
    left = to_double(U, place)
    order, coefficients = _eliminate(left)
    _exchange_(order, coefficients)
    columns, rows = order[:rank].argsort(), order[rank:].argsort()
    pivots = order[:rank][columns]
    C = coefficients[rows][:, columns].to(U.device, dtype)
    Vp = (left[pivots] @ to_double(Vh, place)).to(U.device, dtype)
    return Pivoted(pivots.to(U.device), C, Vp, rounding_growth(C, Vp))


def pivot_bytes(shape: Shape, rank: int) -> int:
    """Peak memory of ``pivot`` beyond its arguments, in bytes, for factors of at most 32 bits; its result is counted.

    Args:
        shape: (N, K) of the weight.
        rank: R.
    """
    n, k = shape
    others = (n - rank) * rank
    return 8 * n * rank + max(24 * others, 12 * others + 8 * rank * (rank + 2 * k))


def other_rows(pivots: Tensor, size: int) -> Tensor:
    """The rows in ``range(size)`` that are no pivots, (N − R,) int64, ascending: the rows of C.

    Args:
        pivots: (R,) int64.
        size: N.
    """
    rest = torch.ones(size, dtype=torch.bool, device=pivots.device)
    rest[pivots] = False
    return rest.nonzero()[:, 0]


def factored(C: Tensor, order: Tensor) -> Tensor:
    """The U, (N, R), with ``weight = U @ Vp``: R rows of the identity and the rows of C. Exact.

    Args:
        C: (N − R, R).
        order: (N,) integers, the pivots, then the other rows.
    """
    identity = torch.eye(C.shape[1], dtype=C.dtype, device=C.device)
    return in_order(torch.cat([identity, C]), order)


def in_order(rows: Tensor, order: Tensor) -> Tensor:
    """The rows of a matrix, row i at place ``order[i]``."""
    return rows.index_select(0, order.argsort())


def rounding_growth(C: Tensor, Vp: Tensor) -> float:
    """How many times the error of the weight is larger if C and Vp are rounded than if the weight itself is.

    Independent relative errors of all numbers, all of one variance, change ``weight`` by this many times as much in the
    Frobenius norm: the root of ``(Σ_j ‖w_j‖² + 2 Σ_ij C_ij² ‖w_j‖²) / ‖weight‖²``, where w_j are the rows of Vp. It is
    1 without other rows, and for a weight of zeros.

    Args:
        C: (N − R, R).
        Vp: (R, K), of the same dtype.
    """
    if not (largest := float(Vp.abs().max())):
        return 1.0
    Vp = Vp / largest  # squares overflow otherwise
    squares = Vp.square().sum(1)  # [R]
    kept = float(squares.sum())
    rest = math.fsum(float((C[rows] @ Vp).square().sum()) for rows in row_blocks(len(C)))
    grown = math.fsum(float((C[rows].square() @ squares).sum()) for rows in row_blocks(len(C)))
    return math.sqrt((kept + 2 * grown) / (kept + rest))


def _eliminate(U: Tensor) -> tuple[Tensor, Tensor]:
    """An order of the rows, (N,), whose first R are the pivots of elimination, and C = U[others] U[pivots]⁻¹, fp64."""
    rank = U.shape[1]
    L, exchanged, _ = torch.linalg.lu_factor_ex(U)  # U[order] = L · (upper triangular), which is above the diagonal
    order = list(range(len(U)))
    for i, j in enumerate(exchanged.tolist()):
        order[i], order[j - 1] = order[j - 1], order[i]
    C = torch.linalg.solve_triangular(L[:rank], L[rank:], upper=False, left=False, unitriangular=True)
    return torch.tensor(order, device=U.device), C


def _exchange_(order: Tensor, C: Tensor) -> None:
    """Exchange a pivot and another row, and update C, until no coefficient is above the largest one."""
    rank = C.shape[1]
    while C.numel():
        i, j = divmod(int(C.abs().argmax()), rank)
        coefficient = float(C[i, j])
        if not abs(coefficient) > LARGEST_COEFFICIENT:
            return
        # With w_i = Σ C_ij w_j: w_j = (w_i − Σ_l≠j C_il w_l) / C_ij, which is put into all rows.
        row = -C[i] / coefficient
        row[j] = 1 / coefficient
        column = C[:, j].clone()
        C[:, j] = 0
        C.addr_(column, row)
        C[i] = row
        order[j], order[rank + i] = order[rank + i].clone(), order[j].clone()
