"""What a decoder layer is called in each model family, and which of its linears can be replaced."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp.errors import UnsupportedModelError
from grasp.model.dense import DenseLinear
from grasp.model.families import ADAPTERS
from grasp.model.lowrank_linear import LowRankLinear


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; ``None`` where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


class Decoder(NamedTuple):
    """The decoder layers of a model, their path, and the norm after the last one where there is one."""

    layers: nn.ModuleList
    norm: nn.Module | None  # models that normalise after each block, as OPT-350M does, have none
    path: str


class Target(NamedTuple):
    """A linear that can be replaced: its path from the model, its layer and its block."""

    name: str
    layer: int
    block: str
    module: DenseLinear


def decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of a model.

    Raises:
        UnsupportedModelError: if no adapter's paths exist in ``model``; the message lists them.
    """
    for adapter in ADAPTERS:
        try:
            layers, norm = model.get_submodule(adapter.layers), attrgetter(adapter.norm)(model)
        except AttributeError:
            continue
        if isinstance(layers, nn.ModuleList) and len(layers) > 0:
            return Decoder(layers, norm, adapter.layers)
    known = ", ".join(adapter.layers for adapter in ADAPTERS)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no decoder layers at any known path ({known}); expected a decoder-only causal "
        "language model. A new family needs one row in grasp.model.families.ADAPTERS."
    )


def layer_targets(model: nn.Module, layer: int) -> tuple[list[Target], dict[str, str]]:
    """The linears of one decoder layer that can be replaced, and the modules that are left with the reason.

    Attention and MLP are told apart by the path: whatever has ``attn`` or ``attention`` in it is attention.
    """
    found = decoder(model)
    prefix = f"{found.path}.{layer}."
    owners = _weight_owners(model)
    targets: list[Target] = []
    left: dict[str, str] = {}
    expert_blocks: list[str] = []
    for path, _ in found.layers[layer].named_modules():
        if path.split(".")[-1] == "experts":
            expert_blocks.append(path.rpartition(".")[0] + ".")
            left[prefix + path] = "mixture-of-experts weights are not compressed"
    for path, module in found.layers[layer].named_modules():
        if prefix + path in left:
            continue
        block = "attention" if "attn" in path or "attention" in path else "mlp"
        if (kind := _kind(module)) not in (nn.Linear, Conv1D):
            if isinstance(module, (nn.Linear, LowRankLinear)):
                left[prefix + path] = f"is a {kind.__name__}, not a dense nn.Linear"
        elif any(path.startswith(expert_block) for expert_block in expert_blocks):
            left[prefix + path] = "belongs to a mixture-of-experts block"
        elif len(names := owners[id(module.weight)]) > 1:
            others = [name for name in names if name != prefix + path]
            left[prefix + path] = f"shares its weight with {', '.join(others)}"
        else:
            targets.append(Target(prefix + path, layer, block, module))
    return targets, left


def _kind(module: nn.Module) -> type:
    """The class of a module, before FSDP gave it another of its own."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        if (weight := getattr(module, "weight", None)) is not None:
            owners.setdefault(id(weight), []).append(name)
    return owners


def replace_module_(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put ``module`` at the path ``name`` of ``model``."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
