"""Regularised least squares on the outputs of a dense weight. Pure functions."""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.method.blocks import BLOCK_ROWS, fp64_device, quadratic_form, row_blocks, to_double
from grasp.method.ranks import Shape

# The given U, or weight, weighs as much as so many tokens, so that few tokens change it little; docs/tried.md.
PRIORS = (3_000, 12_000, 48_000, 192_000)
PRIOR_TOKENS, WEIGHT_PRIOR_TOKENS = 48_000, 10_000  # the first if none of ``PRIORS`` can be chosen
SAMPLED_ROWS = 512  # of U, at most, that choose it
MAP_RIDGE = 1e-3  # of the mean diagonal of Σ y yᵀ; pulls a linear map towards the identity


class Moments(NamedTuple):
    """Sums over the inputs of a linear: x in the dense model, x̂ in the compressed one."""

    cross: Tensor  # Σ x x̂ᵀ, (K, K)
    inputs: Tensor  # Σ x̂ x̂ᵀ, (K, K); the lower triangle is read
    tokens: int  # the number of terms

    @classmethod
    def zeros(cls, width: int, device: torch.device, dtype: torch.dtype, tokens: int) -> Moments:
        """Sums to add to, of so many terms."""
        cross, inputs = (torch.zeros(width, width, device=device, dtype=dtype) for _ in range(2))
        return cls(cross, inputs, tokens)


class Products(NamedTuple):
    """The least squares problem of some rows of U, summed over some of the tokens."""

    gram: Tensor  # Σ (Vh x̂) (Vh x̂)ᵀ, (R, R)
    wanted: Tensor  # Σ (W x) (Vh x̂)ᵀ, the ``sampled_rows`` of it
    tokens: int  # the number of terms


def least_squares(U: Tensor, Vh: Tensor, weight: Tensor, moments: Moments, part: Products | None = None) -> Tensor:
    """The U that minimises ``Σ ‖W x − U Vh x̂‖² + λ ‖U − U₀‖²``, (N, R) in the dtype of ``U``; solved in fp64.

    λ is a number of tokens times the mean square of ``Vh x̂`` over tokens and groups. With ``part`` the number is chosen
    from ``PRIORS`` by cross-validation: some rows of U are fitted to this part of the tokens and to the others, and the
    error of each fit is measured on the tokens that it has not seen. If the mean square is 0, U stays.

    Args:
        U: U₀, (N, R).
        Vh: (R, K).
        weight: W, (N, K).
        moments: of all tokens.
        part: of about half of the tokens; ``None`` for ``PRIOR_TOKENS``.
    """
    place = fp64_device(U.device)
    right = to_double(Vh, place).mT
    gram = quadratic_form(moments.inputs, right)
    if float(gram.diagonal().mean()) == 0:
        return U
    projected = torch.empty_like(right)  # cross · Vhᵀ
    for rows in row_blocks(len(right)):
        projected[rows] = to_double(moments.cross[rows], place) @ right
    del right
    prior = PRIOR_TOKENS if part is None else _chosen_prior(U, weight, gram, projected, moments.tokens, part)
    ridge = _ridge(gram, prior, moments.tokens)
    factors = _factors(gram, ridge)
    del gram
    solution = torch.empty_like(U)
    for rows in row_blocks(len(U)):
        wanted = to_double(weight[rows], place) @ projected
        solution[rows] = _solved(factors, wanted, to_double(U[rows], place), ridge)
    return solution


def sampled_rows(rows: int) -> slice:
    """At most ``SAMPLED_ROWS`` evenly spaced ones of some rows."""
    return slice(None, None, -(-rows // SAMPLED_ROWS))


def _chosen_prior(U: Tensor, weight: Tensor, gram: Tensor, projected: Tensor, tokens: int, part: Products) -> int:
    """The number of tokens that U is to weigh, see ``least_squares``; ``PRIOR_TOKENS`` if a part has no inputs."""
    place, rows = gram.device, sampled_rows(len(U))
    one = Products(to_double(part.gram, place), to_double(part.wanted, place), part.tokens)
    wanted = to_double(weight[rows], place) @ projected
    other = Products(gram - one.gram, wanted - one.wanted, tokens - one.tokens)
    del wanted
    if not all(float(each.gram.diagonal().sum()) > 0 and each.tokens > 0 for each in (one, other)):
        return PRIOR_TOKENS
    U, errors = to_double(U[rows], place), dict.fromkeys(PRIORS, 0.0)
    for fitted, unseen in permutations((one, other)):
        for prior in PRIORS:
            ridge = _ridge(fitted.gram, prior, fitted.tokens)
            errors[prior] += _error(_solved(_factors(fitted.gram, ridge), fitted.wanted, U, ridge), unseen)
    return min(errors, key=errors.__getitem__)


def _error(U: Tensor, products: Products) -> float:
    """``Σ ‖W x − U Vh x̂‖²`` of these rows, but for a constant."""
    return float((U @ products.gram).sub_(products.wanted, alpha=2).mul_(U).sum())


def _ridge(gram: Tensor, prior: float, tokens: int) -> float:
    return prior / tokens * float(gram.diagonal().mean())


def _factors(gram: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """An LU decomposition: rounding errors can make the smallest eigenvalues negative."""
    damped = gram.clone()
    damped.diagonal().add_(ridge)
    return torch.linalg.lu_factor(damped)


def _solved(factors: tuple[Tensor, Tensor], wanted: Tensor, U: Tensor, ridge: float) -> Tensor:
    """``(wanted + ridge · U) (gram + ridge · 1)⁻¹``."""
    return torch.linalg.lu_solve(*factors, wanted.add(U, alpha=ridge), left=False)


def fit_weight(weight: Tensor, moments: Moments) -> Tensor:
    """The V that minimises ``Σ ‖W x − V x̂‖² + λ ‖V − W‖²``, (N, K) in the dtype of ``weight``; solved in fp64.

    It makes up for what the layers before have changed in its inputs. λ is ``WEIGHT_PRIOR_TOKENS`` times the mean
    square of x̂ over tokens and columns.

    Args:
        weight: W, (N, K).
        moments: the sums.
    """
    cross, inputs, tokens = moments
    place = fp64_device(weight.device)
    gram = to_double(inputs, place, copy=True)
    change = (to_double(cross, place) - gram).mT
    ridge = WEIGHT_PRIOR_TOKENS / tokens * float(gram.diagonal().mean())
    if ridge == 0:
        return weight
    gram.diagonal().add_(ridge)
    factor, (n, k) = torch.linalg.cholesky(gram), weight.shape
    if n < k:  # fewer right-hand sides
        return weight + torch.cholesky_solve(change @ to_double(weight, place).mT, factor).mT.to(weight)
    return weight + weight @ torch.cholesky_solve(change, factor).mT.to(weight)


def fit_weight_flops(shape: Shape) -> int:
    """FLOPs of ``fit_weight``: a Cholesky factor, its right-hand sides, and a product."""
    n, k = shape
    return k**3 // 3 + 2 * min(n, k) * k**2 + 2 * n * k**2


def least_squares_bytes(shape: Shape, rank: int, itemsize: int = 4) -> int:
    """Peak memory of ``least_squares`` with a part beyond its arguments, in bytes; its result is counted.

    Args:
        shape: (N, K) of the weight.
        rank: R.
        itemsize: bytes of a number of U.
    """
    (n, k), rows = shape, _row_count(shape)
    block = min(BLOCK_ROWS, max(n, k))
    projecting = 2 * k * rank + rank**2 + block * (k + rank)
    sampling = k * rank + 2 * rank**2 + rows * (k + 2 * rank)
    choosing = k * rank + max(5 * rank**2 + 3 * rows * rank, 4 * rank**2 + 5 * rows * rank)
    solving = k * rank + rank**2 + block * max(k + rank, 3 * rank)
    return max(8 * projecting, 8 * sampling, 8 * choosing, 8 * solving + itemsize * n * rank)


def least_squares_flops(shape: Shape, rank: int) -> int:
    """FLOPs of ``least_squares`` with a part; the arguments are those of ``least_squares_bytes``."""
    (n, k), rows = shape, _row_count(shape)
    projections = k**2 * rank + 2 * k * rank**2 + 2 * k**2 * rank + 2 * rows * k * rank
    choosing = 2 * len(PRIORS) * (2 * rank**3 // 3 + 4 * rows * rank**2)
    return projections + choosing + 2 * rank**3 // 3 + 2 * n * k * rank + 2 * n * rank**2


def products_bytes(shape: Shape, rank: int, itemsize: int = 4) -> int:
    """Bytes of ``Products``, and of the rows of W that they are computed with."""
    return itemsize * (rank**2 + _row_count(shape) * (rank + shape[1]))


def products_flops(shape: Shape, rank: int) -> int:
    """FLOPs for each token of ``Products``, one half of the symmetric one."""
    rows, k = _row_count(shape), shape[1]
    return 2 * k * (rank + rows) + rank**2 + 2 * rows * rank


def _row_count(shape: Shape) -> int:
    return len(range(shape[0])[sampled_rows(shape[0])])


def linear_map(gram: Tensor, cross: Tensor) -> Tensor:
    """The T that minimises ``Σ ‖T y − z‖² + λ ‖T − 1‖²``, with λ = ``MAP_RIDGE`` · mean diagonal of ``Σ y yᵀ``.

    Args:
        gram: ``Σ y yᵀ``, (H, H).
        cross: ``Σ z yᵀ``, (H, H).

    Returns:
        (H, H) fp64.
    """
    place = fp64_device(gram.device)
    gram, cross = to_double(gram, place), to_double(cross, place)
    ridge = _ridge(gram, MAP_RIDGE, 1)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=place)
    return _solved(_factors(gram, ridge), cross, identity, ridge)
