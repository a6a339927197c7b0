"""Delete decoder layers: the baseline that any other way of compressing a layer has to beat."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.model.batch import CalibrationBatch
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.running import passing_through, returns_tuple
from grasp.model.targets import decoder

# What the attention of a family calls its own position, which is where it finds its part of the KV cache.
_INDEX_NAMES = ("layer_idx", "layer_id", "layer_number")
# Configuration lists that name layers by their index, where others have one entry per layer.
_INDEX_LISTS = ("mlp_only_layers", "moe_layers")
# Configuration lists that may chance to be as long as the model is deep.
_OTHER_LISTS = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


def remove_layers_(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Delete decoder layers in place. What is left is a stock model: it generates with a KV cache, saves and loads.

    The layers that stay are renumbered, and so is the configuration, per-layer lists included.

    Args:
        model: a decoder-only causal language model, dense or compressed.
        layers: indices into the decoder layers, in any order.

    Raises:
        ValueError: if an index is out of range or given twice, or no layer would be left.
        UnsupportedModelError: if a layer that stays depends on its position in a way that its configuration cannot
            keep; the model is then as it was.
    """
    found = decoder(model)
    depth = len(found.layers)
    _check(layers, depth)
    if not layers:
        return
    kept = [i for i in range(depth) if i not in set(layers)]
    changes = _changed_config(model, kept)
    _apply(model.config.get_text_config(decoder=True), changes)
    for i in sorted(layers, reverse=True):
        del found.layers[i]
    for new, old in enumerate(kept):
        for module in found.layers[new].modules():
            for name in _INDEX_NAMES:
                if getattr(module, name, None) == old:
                    setattr(module, name, new)
    mark_compressed(model)  # a compressed model's configuration names its low-rank layers by their paths


def removable_layers(model: PreTrainedModel) -> list[int]:
    """The layers each of which ``remove_layers_`` could delete.

    Raises:
        UnsupportedModelError: if there is none; the message has the reason of the last.
    """
    depth = len(decoder(model).layers)
    found: list[int] = []
    why: UnsupportedModelError | None = None
    for layer in range(depth):
        kept = [i for i in range(depth) if i != layer]
        try:
            _changed_config(model, kept)
        except UnsupportedModelError as error:
            why = error
        else:
            found.append(layer)
    if not found and why is not None:
        raise why
    return found


@contextmanager
def skipping(model: PreTrainedModel, layers: Sequence[int], batch: CalibrationBatch) -> Iterator[None]:
    """Let decoder layers do nothing; ``batch`` is any, to see what they return."""
    if not layers:
        yield
        return
    modules = decoder(model).layers
    with passing_through([modules[layer] for layer in layers], returns_tuple(model, batch)):
        yield


def _check(layers: Sequence[int], depth: int) -> None:
    if outside := [i for i in layers if not 0 <= i < depth]:
        raise ValueError(f"the model has decoder layers 0..{depth - 1}; cannot remove {outside}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"each layer can be removed once; got {sorted(layers)}")
    if len(layers) == depth:
        raise ValueError(f"cannot remove all {depth} decoder layers; leave at least one")


def _changed_config(model: PreTrainedModel, kept: Sequence[int]) -> dict[str, Any]:
    """What the configuration becomes when only the layers ``kept`` stay.

    Raises:
        UnsupportedModelError: if a model made from it had other layers than those.
    """
    changes = _config_changes(model.config.get_text_config(decoder=True), kept, len(decoder(model).layers))
    changed = copy.deepcopy(model.config)
    _apply(changed.get_text_config(decoder=True), changes)
    _require_same_layers(type(model), model.config, changed, kept)
    return changes


def _config_changes(config: PreTrainedConfig, kept: Sequence[int], depth: int) -> dict[str, Any]:
    """What a decoder's configuration becomes when only the layers ``kept`` of ``depth`` stay."""
    changes: dict[str, Any] = {"num_hidden_layers": len(kept)}
    for name, value in vars(config).items():
        if not isinstance(value, (list, tuple)) or name in _OTHER_LISTS:
            continue
        if name in _INDEX_LISTS:
            changes[name] = [new for new, old in enumerate(kept) if old in value]
        elif len(value) == depth:
            changes[name] = [value[i] for i in kept]
    return changes


def _apply(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


def _require_same_layers(
    model_class: type[PreTrainedModel], before: PreTrainedConfig, after: PreTrainedConfig, kept: Sequence[int]
) -> None:
    """Raise unless a model built from ``after``, as saved, has the layers ``kept`` of one built from ``before``."""
    old_layers, new_layers = _skeleton(model_class, before), _skeleton(model_class, after)
    for new, old in enumerate(kept):
        expected, got = _description(old_layers[old]), _description(new_layers[new])
        if expected != got:
            name = next(key for key in expected | got if expected.get(key) != got.get(key))
            raise UnsupportedModelError(
                f"layer {old} of {model_class.__name__} cannot become layer {new}: its {name} is "
                f"{expected.get(name, 'set')} there and {got.get(name, 'absent')} here, and the configuration of this "
                "family cannot say so. Remove other layers, or compress these instead."
            )


def _skeleton(model_class: type[PreTrainedModel], config: PreTrainedConfig) -> nn.ModuleList:
    """The decoder layers of a model that a saved and reloaded ``config`` makes, without memory for weights."""
    saved = config.to_dict()
    saved.pop("quantization_config", None)
    with torch.device("meta"):
        return decoder(model_class(type(config).from_dict(saved))).layers


def _description(layer: nn.Module) -> dict[str, object]:
    """The shapes of a layer's parameters, and the plain attributes of its modules save its index."""
    described: dict[str, object] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))) and name not in _INDEX_NAMES:
                described[f"{path}.{name}".lstrip(".")] = value
    return described
