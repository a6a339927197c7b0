"""Each op in plain PyTorch. This is the definition: every other backend must match it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .quantized import KINDS, dequantize


class Factors(NamedTuple):
    """A rank-R linear layer: ``weight = U @ diag(s) @ Vh``.

    U is (N, R), s is (R,) or ``None`` if it is folded into the factors, Vh is (R, K), bias is (N,) or ``None``.

    With ``order`` the factors are pivoted: ``weight[order] = cat([Vh, U @ Vh])``. Vh has R rows of the weight, which
    give R entries of the output, and U, (N − R, R), gives the others: R² fewer parameters and multiplications.
    ``order`` is a permutation of ``range(N)``, (N,) int32, and s is ``None``. R may be N, for a dense weight,
    on a CPU or if Vh is quantised.

    With ``U_scales`` U is quantised, with ``Vh_scales`` Vh is, and s is ``None`` then: int8 or float8_e4m3fn, or uint8
    with two int4 each, half as many columns; see ``quantized.py``. The scales are (rows, groups), fp32 or the dtype of
    the input.

    Example:
        >>> import torch
        >>> from grasp_kernels import Factors
        >>> factors = Factors(U=torch.ones(32, 8), s=None, Vh=torch.ones(8, 64))
        >>> (factors.U @ factors.Vh).shape
        torch.Size([32, 64])
    """

    U: Tensor
    s: Tensor | None
    Vh: Tensor
    bias: Tensor | None = None
    order: Tensor | None = None
    U_scales: Tensor | None = None
    Vh_scales: Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.U.shape[0] if self.order is None else self.order.shape[0]

    @property
    def rank(self) -> int:
        """R."""
        return self.Vh.shape[0]

    @property
    def pivots(self) -> int:
        """The number of outputs that h gives: R, or less if the ranks are padded; 0 without ``order``."""
        return 0 if self.order is None else self.order.shape[0] - self.U.shape[0]

    @property
    def quantized(self) -> bool:
        """Whether U or Vh is."""
        return self.U_scales is not None or self.Vh_scales is not None

    @property
    def kinds(self) -> frozenset[str]:
        """The names of the quantised forms that U and Vh have."""
        pairs = ((self.U, self.U_scales), (self.Vh, self.Vh_scales))
        return frozenset(KINDS[values.dtype] for values, scales in pairs if scales is not None)

    def dequantized(self, in_features: int, dtype: torch.dtype) -> Factors:
        """The same linear with floating factors: each entry is the exact product with its scale, rounded to ``dtype``.

        Args:
            in_features: K; int4 do not tell it.
            dtype: of the factors.
        """
        U, Vh = self.U, self.Vh
        if self.U_scales is not None:
            U = dequantize(U, self.U_scales, Vh.shape[0], dtype)
        if self.Vh_scales is not None:
            Vh = dequantize(Vh, self.Vh_scales, in_features, dtype)
        return Factors(U, self.s, Vh, self.bias, self.order)


class Dense(NamedTuple):
    """A dense linear beside low-rank ones in ``lowrank_linear_merged``: weight is (N, K), bias (N,) or ``None``.

    Example:
        >>> import torch
        >>> from grasp_kernels import Dense, Factors, lowrank_linear_merged
        >>> q, k = Factors(torch.randn(64, 8), None, torch.randn(8, 64)), Dense(torch.randn(16, 64))
        >>> lowrank_linear_merged(torch.randn(2, 64), [q, k]).shape
        torch.Size([2, 80])
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        """N."""
        return self.weight.shape[0]


class Activation(NamedTuple):
    """An activation and its vector-Jacobian product ``(grad, input) -> grad_input``."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    """PyTorch's own backward, or its formula if the gradient is differentiated again: the kernel has no derivative."""
    if not torch.is_grad_enabled():
        return torch.ops.aten.silu_backward(grad, x)
    sigmoid = torch.sigmoid(x)
    return grad * sigmoid * (1 + x * (1 - sigmoid))


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate=approximate),
    )


ACTIVATIONS: dict[str, Activation] = {
    "silu": Activation(F.silu, _silu_backward),
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(F.relu, lambda grad, x: torch.ops.aten.threshold_backward(grad, x, 0)),
}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp32, or fp64 for fp64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def hidden_product(x: Tensor, Vh: Tensor) -> Tensor:
    """``x @ Vh.mT``: (..., K) → (..., R)."""
    return F.linear(readable(x), Vh)


def readable(x: Tensor) -> Tensor:
    """Rows that PyTorch's product reads right.

    oneDNN's bf16 product on AMX also reads the element behind each row if their number of elements is odd.
    """
    return x.contiguous() if x.shape[-1] % 2 else x


def project(x: Tensor, s: Tensor | None, Vh: Tensor) -> Tensor:
    """``(x @ Vh.mT) * s``: (..., K) → (..., R), scaled in fp32, in the dtype of ``x``."""
    h = hidden_product(x, Vh)
    return h if s is None else (h.to(accumulation_dtype(x.dtype)) * s).to(x.dtype)


def linear(
    h: Tensor, U: Tensor, bias: Tensor | None, output: Tensor | None = None, order: Tensor | None = None
) -> Tensor:
    """``h @ U.mT + bias``, or ``y[order] = cat([h, h @ U.mT])`` and then the bias: (M, R) → (M, N).

    ``output`` is filled if given. Columns of h above the number of pivots are padding.
    """
    if order is not None:
        pivots, others = order.long().tensor_split([order.shape[0] - U.shape[0]])
        y = h.new_empty(h.shape[0], order.shape[0]) if output is None else output
        y.index_copy_(1, pivots, h[:, : len(pivots)]).index_copy_(1, others, F.linear(h, U))
        return y if bias is None else y.add_(bias)
    if output is None:
        return F.linear(h, U, bias)
    return torch.mm(h, U.mT, out=output) if bias is None else torch.addmm(bias, h, U.mT, out=output)


def lowrank_linear(
    x: Tensor,
    U: Tensor,
    s: Tensor | None,
    Vh: Tensor,
    bias: Tensor | None,
    order: Tensor | None = None,
    U_scales: Tensor | None = None,
    Vh_scales: Tensor | None = None,
    output: Tensor | None = None,
) -> Tensor:
    """``((x @ Vh.mT) * s) @ U.mT + bias``, or ``h = x @ Vh.mT; y[order] = cat([h, h @ U.mT])``; x is (M, K).

    ``output``, (M, N), is filled if given. Quantised factors are first dequantised.
    """
    factors = Factors(U, s, Vh, bias, order, U_scales, Vh_scales)
    if factors.quantized:
        U, s, Vh, *_ = factors.dequantized(x.shape[1], x.dtype)
    if order is not None and not U.shape[0]:  # a dense weight: its rows are moved, not the columns of y
        y = hidden_product(x, Vh.index_select(0, order.argsort()))
        y = y if bias is None else y.add_(bias)
        return y if output is None else output.copy_(y)
    return linear(project(x, s, Vh), U, bias, output, order)


def lowrank_linear_grouped(
    x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Several low-rank linears of one input; x is (M, K). ``outputs``, (M, N_i), are filled if given."""
    places = [None] * len(factors) if outputs is None else outputs
    return [lowrank_linear(x, *group, output=y) for group, y in zip(factors, places, strict=True)]


def lowrank_glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """``act(gate(x)) * up(x)``; x is (M, K)."""
    return ACTIVATIONS[activation].forward(lowrank_linear(x, *gate)) * lowrank_linear(x, *up)


def equal_samples(x: Tensor) -> Tensor:
    """The ``cu_seqlens`` of an input without one: each index of ``x.shape[:-2]`` is a sample, (B + 1,) int64."""
    length = x.shape[-2] if x.dim() > 1 else 1
    return torch.arange(x.shape[:-2].numel() + 1, device=x.device, dtype=torch.int64) * length


def sum_segments(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sum rows ``cu_seqlens[b]:cu_seqlens[b + 1]`` for each b: (T, R) → (B, R); an empty segment sums to 0."""
    return torch.segment_reduce(values, "sum", lengths=cu_seqlens.diff().to(torch.int64), axis=0, initial=0)


def singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    cu_seqlens: Tensor | None,
    per_sample: bool,
    second_moment: str,
    mask: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``colsum((grad_y @ U) * (x @ Vh.mT))`` and the sum of squared unit gradients; x is (T, K), grad_y is (T, N).

    The second result is empty if ``second_moment`` is ``"none"``.
    """
    dtype = accumulation_dtype(x.dtype)
    token = (grad_y.to(dtype) @ U.to(dtype)) * (x.to(dtype) @ Vh.to(dtype).mT)  # [T, R]
    if mask is not None:
        token = token.masked_fill(~mask[:, None], 0)
    sample = sum_segments(token, cu_seqlens) if cu_seqlens is not None else None  # [B, R]
    if per_sample:
        assert sample is not None
        assert cu_seqlens is not None
        squares = sum_segments(token.square(), cu_seqlens) if second_moment == "token" else sample.square()
        return sample, squares if second_moment != "none" else token.new_empty(0)
    first = token.sum(0)
    if second_moment == "none":
        return first, token.new_empty(0)
    unit = token if second_moment == "token" else sample
    assert unit is not None
    return first, unit.square().sum(0)
