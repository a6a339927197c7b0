"""The definition of GRASP: its formulas in plain PyTorch, without any optimisation (arXiv 2501.00339).

The package is tested and timed against it. Every linear becomes an SVD layer in which only s has a gradient. The dense
weight is rebuilt in every forward pass. Every sweep runs the whole model, one sequence at a time, with the loss of the
next token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Conv1D, PreTrainedModel


class SVDLinear(nn.Module):
    """``F.linear(x, U diag(s) Vh, bias)``; only s, (groups,), is trainable. The weight is rebuilt in every call."""

    def __init__(self, linear: nn.Linear | Conv1D) -> None:
        super().__init__()
        weight = linear.weight.detach()
        weight = weight.mT if isinstance(linear, Conv1D) else weight
        self.U, s, self.Vh = torch.linalg.svd(weight, full_matrices=False)
        self.s = nn.Parameter(s)
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) → (..., N)."""
        return F.linear(x, (self.U * self.s) @ self.Vh, self.bias)

    @property
    def importance(self) -> Tensor:
        """``|s · Σ ∂L/∂s|``, (groups,); 0 if no gradient reached s."""
        s = self.s.detach()
        return torch.zeros_like(s) if self.s.grad is None else (s * self.s.grad).abs()

    def rank(self, retain_ratio: float) -> int:
        """The rank that retains ``retain_ratio`` of the parameters of the weight."""
        n, k = len(self.U), self.Vh.shape[1]
        return max(1, int(n * k * retain_ratio / (n + k)))

    def truncated(self, indices: Tensor) -> nn.Sequential:
        """Two linears with the groups ``indices``; the square root of s is folded into each."""
        root = self.s.detach()[indices].sqrt()
        down = nn.Linear(self.Vh.shape[1], len(indices), bias=False, device="meta")
        up = nn.Linear(len(indices), len(self.U), bias=self.bias is not None, device="meta")
        down.weight = nn.Parameter(root[:, None] * self.Vh[indices], requires_grad=False)
        up.weight = nn.Parameter(self.U[:, indices] * root, requires_grad=False)
        if self.bias is not None:
            up.bias = self.bias
        return nn.Sequential(down, up)


def insert_svd_(model: PreTrainedModel, names: Sequence[str]) -> dict[str, SVDLinear]:
    """Freeze the model, and replace the named linears by SVD layers."""
    model.requires_grad_(False)
    layers = {name: SVDLinear(model.get_submodule(name)) for name in names}  # type: ignore[arg-type]
    for name, layer in layers.items():
        model.set_submodule(name, layer)
    return layers


def mean_nll(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token in (B, L), in nats and in the dtype of the logits."""
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


def accumulate(model: PreTrainedModel, sequences: Sequence[Tensor]) -> None:
    """Add the gradient of the mean loss over ``sequences``, (B, L) each, to all trainable parameters."""
    for tokens in sequences:
        (mean_nll(model, tokens) / len(sequences)).backward()


def naive_grasp_(
    model: PreTrainedModel, sequences: Sequence[Tensor], sweeps: Sequence[Sequence[str]], retain_ratio: float
) -> dict[str, list[int]]:
    """Compress a model in place; the linears named in one element of ``sweeps`` share a sweep over ``sequences``.

    Returns:
        For each linear the singular groups that it retains, ascending.
    """
    kept: dict[str, list[int]] = {}
    for names in sweeps:
        layers = insert_svd_(model, names)
        accumulate(model, sequences)
        for name, layer in layers.items():
            indices = layer.importance.topk(layer.rank(retain_ratio)).indices.sort().values
            model.set_submodule(name, layer.truncated(indices))
            kept[name] = indices.tolist()
    return kept
