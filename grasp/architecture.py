"""What a decoder layer is called in each model family, and which of its linears can be replaced."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from grasp.errors import UnsupportedModelError
from grasp.modules import DenseLinear, LowRankLinear

if TYPE_CHECKING:
    from grasp.calibration import Tokens


class Adapter(NamedTuple):
    """Where a family keeps its decoder layers and its final norm: attribute paths from the model."""

    layers: str
    norm: str


# The first row whose two paths exist describes the model. The families named are examples.
ADAPTERS: tuple[Adapter, ...] = (
    Adapter("model.layers", "model.norm"),  # Llama, Mistral, Mixtral, Qwen2, Qwen3, Gemma, Phi-3, OLMo
    Adapter("model.layers", "model.final_layernorm"),  # Phi
    Adapter("model.decoder.layers", "model.decoder.final_layer_norm"),  # OPT
    Adapter("model.language_model.layers", "model.language_model.norm"),  # text part of image-text models
    Adapter("transformer.h", "transformer.ln_f"),  # GPT-2, GPT-J, BLOOM
    Adapter("transformer.blocks", "transformer.norm_f"),  # MPT
    Adapter("gpt_neox.layers", "gpt_neox.final_layer_norm"),  # GPT-NeoX, Pythia
)

BLOCKS = ("mlp", "attention")  # in the order in which GRASP compresses a layer


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
        "language model. A new family needs one row in grasp.architecture.ADAPTERS."
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


def backbone(model: PreTrainedModel) -> nn.Module:
    """The model without its head: what turns tokens into hidden states."""
    return model.base_model


def hidden_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states among the arguments of a decoder layer, (B, L, H)."""
    return args[0] if args else kwargs["hidden_states"]


def hidden_output(output: Any) -> Tensor:
    """The hidden states that a decoder layer returned, (B, L, H): itself, or the first of a tuple."""
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def passing_through(layers: Sequence[nn.Module], returns_tuple: bool) -> Iterator[None]:
    """Make decoder layers return their input unchanged: all that surrounds them (masks, positions) still happens."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        hidden = hidden_input(args, kwargs)
        return (hidden,) if returns_tuple else hidden

    saved = [layer.__dict__.get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = forward
        yield
    finally:
        for layer, original in zip(layers, saved, strict=True):
            if original is None:
                layer.__dict__.pop("forward", None)
            else:
                layer.forward = original


@contextmanager
def entering_with(layer: nn.Module, hidden: Tensor) -> Iterator[None]:
    """Make a decoder layer take ``hidden`` instead of what it is given."""

    def substitute(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        given = hidden_input(args, kwargs)
        value = hidden.to(given.device)
        if args:
            return (value, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": value}

    handle = layer.register_forward_pre_hook(substitute, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode and frozen parameters, both restored afterwards; modules replaced meanwhile keep what they have."""
    training = {module: module.training for module in model.modules()}
    frozen = [
        (module, name, parameter, parameter.requires_grad)
        for module in training
        for name, parameter in module.named_parameters(recurse=False)
    ]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode
        for module, name, parameter, requires_grad in frozen:
            parameter.requires_grad_(requires_grad)
            module.get_parameter(name).requires_grad_(requires_grad)  # another one, if it is offloaded


@contextmanager
def casting(model: nn.Module, dtype: str | None) -> Iterator[None]:
    """Run a model in another dtype, ``"bfloat16"`` say; its own weights are put back, bit for bit. ``None``: as it is.

    Raises:
        UnsupportedModelError: if weights are offloaded or sharded.
    """
    if dtype is None:
        yield
        return
    if any(parameter.is_meta or isinstance(parameter, DTensor) for parameter in model.parameters()):
        raise UnsupportedModelError(
            f"sweep_dtype={dtype!r} needs all weights in memory, but some are offloaded or sharded; load the model in "
            f"that dtype, as from_pretrained(..., dtype={dtype!r}) does, and leave sweep_dtype out"
        )
    wanted = getattr(torch, dtype)
    saved = {p: p.data for p in model.parameters() if p.is_floating_point() and p.dtype != wanted}
    try:
        for parameter, data in saved.items():
            parameter.data = data.to(wanted)
        yield
    finally:
        for parameter, data in saved.items():
            parameter.data = data


def batch_inputs(model: nn.Module, batch: Tokens) -> dict[str, Tensor]:
    """Keyword arguments of a forward pass over a batch, on the device where the model takes its tokens."""
    device = first_device(model)
    inputs = {"input_ids": batch.input_ids.to(device)}
    if batch.attention_mask is not None:
        inputs["attention_mask"] = batch.attention_mask.to(device, torch.int64)
    return inputs


def first_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameter that holds data."""
    return next((p.device for p in model.parameters() if p.device.type != "meta"), torch.device("cpu"))
