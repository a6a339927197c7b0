"""The low-rank linear layer, and how a dense weight becomes one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from grasp.errors import NonFiniteError
from grasp_kernels import lowrank_linear

DenseLinear = nn.Linear | Conv1D


class SVD(NamedTuple):
    """``weight = U @ diag(S) @ Vh``: U (N, min(N, K)), S descending, Vh (min(N, K), K)."""

    U: Tensor
    S: Tensor
    Vh: Tensor


def dense_weight(linear: DenseLinear) -> Tensor:
    """The weight as (N, K), out_features first: GPT-2's ``Conv1D`` stores its transpose."""
    weight = linear.weight.detach()
    return weight.mT if isinstance(linear, Conv1D) else weight


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


class LowRankLinear(nn.Module):
    """A linear layer of rank R: ``y = (x @ Vh.mT) @ U.mT + bias``, the singular values folded into both factors.

    Parameters are U (N, R), Vh (R, K) and bias (N,) or ``None``; they share one dtype.
    """

    U: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank must be between 1 and {min(in_features, out_features)} for a linear of "
                f"{in_features} inputs and {out_features} outputs, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.Vh = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors, such that ``U @ Vh`` has the variance of a freshly made ``nn.Linear``."""
        nn.init.normal_(self.U, std=self.rank**-0.5)
        nn.init.normal_(self.Vh, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(cls, linear: DenseLinear, indices: Tensor, svd: SVD | None = None) -> LowRankLinear:
        """Keep the singular groups ``indices`` of a dense linear.

        Args:
            linear: an ``nn.Linear`` or GPT-2's ``Conv1D``.
            indices: (R,) int64, which groups are kept, 0 being the one with the largest singular value.
            svd: the weight's decomposition where the caller has it; otherwise computed here.

        Raises:
            ValueError: if ``indices`` is empty, out of range or has duplicates.
            NonFiniteError: if the weight has NaN or infinite entries.
        """
        weight = dense_weight(linear)
        groups = min(weight.shape)
        picked = indices.tolist()
        if not picked or min(picked) < 0 or max(picked) >= groups or len(set(picked)) < len(picked):
            raise ValueError(f"indices must be distinct, at least one, each in 0..{groups - 1}; got {picked}")
        U, S, Vh = decompose(weight) if svd is None else svd
        indices = indices.to(S.device)
        root = S[indices].sqrt()
        module = cls(
            weight.shape[1],
            weight.shape[0],
            len(picked),
            bias=linear.bias is not None,
            device=weight.device,
            dtype=weight.dtype,
        )
        with torch.no_grad():
            module.U.copy_(U[:, indices] * root)
            module.Vh.copy_(root[:, None] * Vh[indices])
            if module.bias is not None:
                module.bias.copy_(linear.bias)
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        return lowrank_linear(x, self.U, None, self.Vh, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight this layer stands for, (out_features, in_features) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        return self.U.to(dtype) @ self.Vh.to(dtype)

    def extra_repr(self) -> str:
        """Shape, rank, and the share of the dense weight's parameters that is left."""
        dense = self.in_features * self.out_features
        share = self.rank * (self.in_features + self.out_features) / dense
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, parameters={share:.1%} of dense"
        )
