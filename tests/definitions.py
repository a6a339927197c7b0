"""What the ops mean, written a second time: naively, and in whatever dtype the arguments have."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels import Factors

ACTIVATIONS = {
    "silu": lambda x: x * torch.sigmoid(x),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "relu": lambda x: x.clamp(min=0),
}


def linear(x: Tensor, group: Factors) -> Tensor:
    """Two linears, as one would write them in PyTorch; s is applied in its own dtype."""
    h = F.linear(x, group.Vh)
    if group.s is not None:
        h = (h * group.s).to(x.dtype)
    if group.order is None:
        return F.linear(h, group.U, group.bias)
    y = torch.cat([h, F.linear(h, group.U)], -1)[..., group.order.argsort()]
    return y if group.bias is None else y + group.bias


def dense_linear(x: Tensor, group: Factors) -> Tensor:
    """One linear whose weight is ``U @ diag(s) @ Vh``, or that of pivoted factors."""
    scaled = group.U if group.s is None else group.U * group.s
    weight = scaled @ group.Vh
    if group.order is not None:
        weight = torch.cat([group.Vh, weight])[group.order.argsort()]
    return F.linear(x, weight, group.bias)


def glu(x: Tensor, gate: Factors, up: Factors, activation: str) -> Tensor:
    """``act(gate(x)) * up(x)``, every step rounded to the dtype of ``x``."""
    return ACTIVATIONS[activation](linear(x, gate)) * linear(x, up)


def singular_value_grad(
    x: Tensor,
    grad_y: Tensor,
    U: Tensor,
    Vh: Tensor,
    *,
    cu_seqlens: Tensor | None = None,
    per_sample: bool = False,
    second_moment: str | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """A loop over samples and tokens: the diagonal of ``U.mT @ (d outer x) @ Vh.mT``, token by token."""
    if cu_seqlens is None:
        lengths = [x.shape[-2] if x.dim() > 1 else 1] * x.shape[:-2].numel()
        bounds = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    else:
        bounds = cu_seqlens.tolist()
    x, grad_y = x.reshape(bounds[-1], x.shape[-1]), grad_y.reshape(bounds[-1], grad_y.shape[-1])
    kept = torch.ones(bounds[-1], dtype=torch.bool) if mask is None else mask.flatten()
    zero = x.new_zeros(Vh.shape[0])
    first, second = [], []
    for start, stop in pairwise(bounds):
        tokens = [(U.mT @ grad_y[t]) * (Vh @ x[t]) for t in range(start, stop) if kept[t]]
        first.append(sum(tokens, zero))
        second.append(
            sum((token.square() for token in tokens), zero) if second_moment == "token" else first[-1].square()
        )
    samples, squares = torch.stack(first), torch.stack(second)
    if not per_sample:
        samples, squares = samples.sum(0), squares.sum(0)
    return samples, None if second_moment is None else squares
