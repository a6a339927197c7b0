"""MLPs with fewer channels than the architecture gives them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from grasp.method.channels import widths_of
from grasp.method.ranks import Shape
from grasp.model.dense import gathered
from grasp.model.gated_mlp import FORMULA, formula_of
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import execution_device, fetched, place_like, release_
from grasp.model.quantized_linear import QuantizedLinear, QuantizedLowRankLinear

GATE_UP, DOWN = ("gate_proj", "up_proj"), "down_proj"  # of ``FORMULA``
_MARK = "grasp_narrowed"  # attribute of an MLP: it stays when its linears are replaced, and its layer renumbered
LINEARS = (nn.Linear, LowRankLinear, QuantizedLinear, QuantizedLowRankLinear)


def can_narrow(mlp: nn.Module) -> bool:
    """Whether a module is a gated MLP of three dense linears, whole: channels can be removed, unseen from outside.

    Serving stacks make a bias of channels as long as the architecture says, so there must be none.
    """
    linears = [module for name in (*GATE_UP, DOWN) if isinstance(module := getattr(mlp, name, None), nn.Linear)]
    if getattr(mlp, _MARK, False) or len(linears) < 3 or any(linear.bias is not None for linear in linears[:2]):
        return False
    return formula_of(type(mlp).forward) == FORMULA


@torch.no_grad()
def narrow_mlp_(mlp: nn.Module, channels: Tensor, down: Tensor) -> None:
    """Leave a gated MLP some of its channels.

    Args:
        mlp: one that ``can_narrow``.
        channels: (n,) int64, ascending.
        down: (N, n), the new weight of ``down_proj``.
    """
    rows = {name: weight[channels] for name, weight in mlp_weights(mlp, *GATE_UP).items()}
    resize_mlp_(mlp, {**rows, DOWN: down})
    mark_narrowed(mlp)


@torch.no_grad()
def resize_mlp_(mlp: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give the linears of an MLP, by name, other weights, (N, K); theirs are freed. Biases, of outputs alone, stay.

    Weights that are sharded or offloaded stay so.
    """
    for name, weight in weights.items():
        linear = mlp.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        resized = empty_linear(linear, (len(weight), weight.shape[1]), execution_device(linear))
        resized.requires_grad_(linear.weight.requires_grad)
        resized.weight.copy_(weight)
        if linear.bias is not None:
            resized.bias.copy_(gathered(fetched(linear, "bias")))
        place_like(resized, linear)
        setattr(mlp, name, resized)
        release_(linear)


def mlp_weights(mlp: nn.Module, *names: str) -> dict[str, Tensor]:
    """The weights of dense linears of an MLP, (N, K), by name; sharded ones are gathered, offloaded ones fetched."""
    return {name: gathered(fetched(mlp.get_submodule(name), "weight")) for name in names}


def mark_narrowed(mlp: nn.Module, narrowed: bool = True) -> None:
    """Note that the linears of an MLP have other shapes than the architecture's, or no longer."""
    if narrowed:
        setattr(mlp, _MARK, True)
    else:
        vars(mlp).pop(_MARK, None)


def narrowed_mlps(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The MLPs that are marked, with their paths."""
    return ((path, module) for path, module in model.named_modules() if getattr(module, _MARK, False))


def narrowed_shapes(model: nn.Module) -> dict[str, Shape]:
    """The shapes, [N, K], of the linears in marked MLPs, by path: those of the ``quantization_config``."""
    return {
        f"{path}.{name}": (child.out_features, child.in_features)
        for path, mlp in narrowed_mlps(model)
        for name, child in mlp.named_children()
        if isinstance(child, LINEARS)
    }


def narrowest_shapes(model: nn.Module) -> list[Shape]:
    """The shapes, (N, K), of the linears of MLPs that can be narrowed and are whole, with as few channels as may be."""
    shapes: list[Shape] = []
    for mlp in filter(can_narrow, model.modules()):
        outputs, channels = mlp.get_parameter(f"{DOWN}.weight").shape
        inputs = mlp.get_parameter(f"{GATE_UP[0]}.weight").shape[1]
        for width in widths_of(channels)[-1:]:
            shapes += [(width, inputs), (outputs, width)]
    return shapes


def empty_linear(like: nn.Linear, shape: Shape, device: torch.device | str | None = None) -> nn.Linear:
    """A linear of the dtype of another one, of another shape, (N, K), without data."""
    (n, k), place = shape, like.weight.device if device is None else device
    linear: nn.Linear = skip_init(nn.Linear, k, n, bias=like.bias is not None, device=place, dtype=like.weight.dtype)
    return linear.train(like.training)
