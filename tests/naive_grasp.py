"""GRASP as the paper writes it, without any of the package's short cuts: SVD layers in the graph, full sweeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D


class SVDLinear(nn.Module):
    """``U diag(s) Vh`` with only s trainable; the dense weight is rebuilt on every forward."""

    def __init__(self, linear: nn.Module) -> None:
        super().__init__()
        weight = linear.weight.detach().T if isinstance(linear, Conv1D) else linear.weight.detach()
        U, s, Vh = torch.linalg.svd(weight, full_matrices=False)
        self.U, self.Vh, self.bias = U, Vh, linear.bias
        self.s = nn.Parameter(s)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.U @ torch.diag(self.s) @ self.Vh, self.bias)


def set_module(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def mean_nll(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Mean negative log-likelihood of each next token, in the dtype of the logits (transformers' own loss is fp32)."""
    log_probabilities = model(tokens).logits[:, :-1].log_softmax(-1)
    return -log_probabilities.gather(2, tokens[:, 1:, None]).mean()


def singular_value_grads(model: PreTrainedModel, batches: Sequence[Tensor], names: Sequence[str]) -> dict[str, Tensor]:
    """Replace the named linears by SVD layers and return ∂L/∂σ of the mean loss; the layers stay in the model."""
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    layers = {name: SVDLinear(model.get_submodule(name)) for name in names}
    for name, layer in layers.items():
        set_module(model, name, layer)
    for batch in batches:
        (mean_nll(model, batch) / len(batches)).backward()
    return {name: layer.s.grad for name, layer in layers.items()}


def naive_grasp(
    model: PreTrainedModel, batches: Sequence[Tensor], blocks: Sequence[Sequence[str]], retain_ratio: float
) -> dict[str, list[int]]:
    """Compress the blocks, lists of linear names, in the order given; returns the kept groups of each linear."""
    kept: dict[str, list[int]] = {}
    for names in blocks:
        grads = singular_value_grads(model, batches, names)
        for name in names:
            layer = model.get_submodule(name)
            n, k = layer.U.shape[0], layer.Vh.shape[1]
            rank = int(n * k * retain_ratio / (n + k))
            importance = (layer.s.detach() * grads[name]).abs()
            kept[name] = sorted(torch.topk(importance, rank).indices.tolist())
            dense = nn.Linear(k, n, bias=layer.bias is not None)
            weight = sum(layer.s.detach()[i] * torch.outer(layer.U[:, i], layer.Vh[i]) for i in kept[name])
            dense.weight = nn.Parameter(weight, requires_grad=False)
            if layer.bias is not None:
                dense.bias = layer.bias
            set_module(model, name, dense)
    return kept
