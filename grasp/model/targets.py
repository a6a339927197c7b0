"""The decoder layers of a model, and the linears in them that can be replaced."""

from __future__ import annotations

from operator import attrgetter
from typing import NamedTuple

from torch import nn
from torch.distributed.fsdp import FSDPModule
from transformers import Conv1D, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.model.dense import DenseLinear
from grasp.model.families import FAMILIES, Family
from grasp.model.lowrank_linear import LowRankLinear


def max_positions(model: PreTrainedModel) -> int | None:
    """The longest sequence that the model supports, in tokens; ``None`` if its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def vocabulary_size(model: PreTrainedModel) -> int:
    """The number of logits of a token."""
    return model.config.get_text_config(decoder=True).vocab_size


class Decoder(NamedTuple):
    """The decoder layers of a model, the norm after the last one, and the row of the table that describes them."""

    layers: nn.ModuleList
    norm: nn.Module | None  # models that normalise after each block, such as OPT-350M, have none
    family: Family

    @property
    def path(self) -> str:
        """Path of the layers from the model."""
        return self.family.layers


class Target(NamedTuple):
    """A linear that can be replaced: its path from the model, its layer, and its block, "attention" or "mlp"."""

    name: str
    layer: int
    block: str
    module: DenseLinear


def decoder(model: nn.Module) -> Decoder:
    """Find the decoder layers of a model.

    Raises:
        UnsupportedModelError: if no family's paths exist in ``model``; the message lists them.
    """
    for family in FAMILIES:
        for norm in family.norms:
            try:
                layers, final_norm = model.get_submodule(family.layers), attrgetter(norm)(model)
            except AttributeError:
                continue
            if isinstance(layers, nn.ModuleList) and len(layers) > 0:
                return Decoder(layers, final_norm, family)
    known = ", ".join(family.layers for family in FAMILIES)
    raise UnsupportedModelError(
        f"{type(model).__name__} has no decoder layers at any known path ({known}); expected a decoder-only causal "
        "language model. A new family needs one row in grasp.model.families.FAMILIES."
    )


def layer_targets(model: nn.Module, layer: int) -> tuple[list[Target], dict[str, str]]:
    """The linears of one decoder layer that can be replaced; the modules that cannot, with the reason."""
    layers, _, family = decoder(model)
    prefix = f"{family.layers}.{layer}."
    owners = _weight_owners(model)
    targets: list[Target] = []
    left: dict[str, str] = {}
    expert_blocks: list[str] = []
    for path, _ in layers[layer].named_modules():
        if path.split(".")[-1] == "experts":
            parent = path.rpartition(".")[0]  # of experts and their router; none where they are beside an MLP
            expert_blocks += [f"{parent}."] if parent else ["experts.", "router."]
            left[prefix + path] = "mixture-of-experts weights are not compressed"
    for path, module in layers[layer].named_modules():
        if prefix + path in left:
            continue
        if (kind := _kind(module)) not in (nn.Linear, Conv1D):
            if isinstance(module, (nn.Linear, LowRankLinear)):
                left[prefix + path] = f"is a {kind.__name__}, not a dense nn.Linear"
        elif any(path.startswith(expert_block) for expert_block in expert_blocks):
            left[prefix + path] = "belongs to a mixture-of-experts block"
        elif len(names := owners[id(module.weight)]) > 1:
            others = [name for name in names if name != prefix + path]
            left[prefix + path] = f"shares its weight with {', '.join(others)}"
        else:
            targets.append(Target(prefix + path, layer, family.block(path), module))
    return targets, left


def all_targets(model: nn.Module) -> list[Target]:
    """The linears of all decoder layers that can be replaced."""
    return [target for layer in range(len(decoder(model).layers)) for target in layer_targets(model, layer)[0]]


def _kind(module: nn.Module) -> type:
    """The class of a module; the original one if FSDP has replaced it."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, FSDPModule))


def _weight_owners(model: nn.Module) -> dict[int, list[str]]:
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if (weight := getattr(module, "weight", None)) is not None:
            owners.setdefault(id(weight), []).append(name)
    return owners
