"""Regularised least squares on the outputs of a dense weight. Pure functions."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp.method.blocks import BLOCK_ROWS, fp64_device, quadratic_form, row_blocks, to_double
from grasp.method.ranks import Shape

# The given U, or weight, weighs as much as so many tokens, so that few tokens change it little; docs/study.md.
PRIOR_TOKENS, WEIGHT_PRIOR_TOKENS = 48_000, 10_000


def least_squares(U: Tensor, Vh: Tensor, weight: Tensor, cross: Tensor, inputs: Tensor, tokens: int) -> Tensor:
    """The U that minimises ``Σ ‖W x − U Vh x̂‖² + λ ‖U − U₀‖²``, (N, R) in the dtype of ``U``; solved in fp64.

    λ is ``PRIOR_TOKENS`` times the mean square of ``Vh x̂`` over tokens and groups. If that is 0, U stays.

    Args:
        U: U₀, (N, R).
        Vh: (R, K).
        weight: W, (N, K).
        cross: ``Σ x x̂ᵀ``, (K, K): inputs in the dense model by those in the compressed one.
        inputs: ``Σ x̂ x̂ᵀ``, (K, K); the lower triangle is read.
        tokens: the number of terms in these sums.
    """
    place = fp64_device(U.device)
    right = to_double(Vh, place).mT
    gram = quadratic_form(inputs, right)
    ridge = PRIOR_TOKENS / tokens * float(gram.diagonal().mean())
    if ridge == 0:
        return U
    gram.diagonal().add_(ridge)
    projected = torch.empty_like(right)  # cross · Vhᵀ
    for rows in row_blocks(len(cross)):
        projected[rows] = to_double(cross[rows], place) @ right
    del right
    factors, pivots = torch.linalg.lu_factor(gram)
    del gram
    solution = torch.empty_like(U)
    for rows in row_blocks(len(U)):
        wanted = (to_double(weight[rows], place) @ projected).add_(to_double(U[rows], place), alpha=ridge)
        solution[rows] = torch.linalg.lu_solve(factors, pivots, wanted, left=False)
    return solution


def fit_weight(weight: Tensor, cross: Tensor, inputs: Tensor, tokens: int) -> Tensor:
    """The V that minimises ``Σ ‖W x − V x̂‖² + λ ‖V − W‖²``, (N, K) in the dtype of ``weight``; solved in fp64.

    It makes up for what the layers before have changed in its inputs. λ is ``WEIGHT_PRIOR_TOKENS`` times the mean
    square of x̂ over tokens and columns.

    Args:
        weight: W, (N, K).
        cross: ``Σ x x̂ᵀ``, (K, K).
        inputs: ``Σ x̂ x̂ᵀ``, (K, K).
        tokens: the number of terms in these sums.
    """
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
    """Peak memory of ``least_squares`` beyond its arguments, in bytes; its result is counted.

    Args:
        shape: (N, K) of the weight.
        rank: R.
        itemsize: bytes of a number of U.
    """
    n, k = shape
    block = min(BLOCK_ROWS, max(n, k))
    projecting = 2 * k * rank + rank**2 + block * (k + rank)
    solving = k * rank + rank**2 + block * max(k + rank, 3 * rank)
    return max(8 * projecting, 8 * solving + itemsize * n * rank)


def least_squares_flops(shape: Shape, rank: int) -> int:
    """FLOPs of ``least_squares``; the arguments are those of ``least_squares_bytes``."""
    n, k = shape
    projections = k**2 * rank + 2 * k * rank**2 + 2 * k**2 * rank
    return projections + 2 * rank**3 // 3 + 2 * n * k * rank + 2 * n * rank**2
