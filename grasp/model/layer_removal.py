"""Deletion of decoder layers, in the model and in its configuration."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from grasp.errors import UnsupportedModelError
from grasp.formatting import one_line
from grasp.model.families import Family
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.skeleton import skeleton
from grasp.model.targets import decoder

# Configuration lists without an entry per layer; their length may equal the number of layers by chance.
_OTHER_LISTS = ("architectures", "bos_token_id", "eos_token_id", "pad_token_id", "suppress_tokens")


def remove_layers_(model: PreTrainedModel, layers: Sequence[int]) -> None:
    """Delete decoder layers in place. The result is a stock model: it generates with a KV cache, saves and loads.

    The remaining layers are renumbered. The configuration changes with them, per-layer lists included.

    Args:
        model: a decoder-only causal language model, dense or compressed.
        layers: indices of decoder layers, in any order.

    Raises:
        ValueError: if an index is out of range or given twice, or no layer would remain.
        UnsupportedModelError: if a remaining layer depends on its position and the configuration cannot express its new
            position; the model is then unchanged.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> sizes = {"vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
        >>> model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=3))
        >>> remove_layers_(model, [1])
        >>> len(model.model.layers), model.config.num_hidden_layers
        (2, 2)
    """
    modules, _, family = decoder(model)
    _check(layers, len(modules))
    if not layers:
        return
    remaining = [i for i in range(len(modules)) if i not in set(layers)]
    changes = _changed_config(model, remaining)
    _apply(model.config.get_text_config(decoder=True), changes)
    for i in sorted(layers, reverse=True):
        del modules[i]
    for new, old in enumerate(remaining):
        for module in modules[new].modules():
            for name in family.index_names:
                if getattr(module, name, None) == old:
                    setattr(module, name, new)
    mark_compressed(model)  # the configuration of a compressed model names low-rank layers by their paths


def can_remove(model: PreTrainedModel, layers: Sequence[int]) -> bool:
    """Whether ``remove_layers_`` could delete some layers together, with at least one left."""
    depth = len(decoder(model).layers)
    if len(layers) == depth:
        return False
    _check(layers, depth)
    try:
        _changed_config(model, [i for i in range(depth) if i not in set(layers)])
    except UnsupportedModelError:
        return False
    return True


def _check(layers: Sequence[int], depth: int) -> None:
    if outside := [i for i in layers if not 0 <= i < depth]:
        raise ValueError(f"the model has decoder layers 0..{depth - 1}; cannot remove {outside}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"a layer can be removed once; got {sorted(layers)}")
    if len(layers) == depth:
        raise ValueError(f"cannot remove all {depth} decoder layers; leave at least one")


def _changed_config(model: PreTrainedModel, remaining: Sequence[int]) -> dict[str, Any]:
    """The new values of the configuration of a model that has only the ``remaining`` layers.

    Raises:
        UnsupportedModelError: if there is no model of the new configuration, or it has other layers, or other
            parameters outside of them.
    """
    layers, _, family = decoder(model)
    changes = _config_changes(model.config.get_text_config(decoder=True), family, remaining, len(layers))
    changed = copy.deepcopy(model.config)
    _apply(changed.get_text_config(decoder=True), changes)
    _require_same_layers(type(model), model.config, changed, remaining)
    return changes


def _config_changes(config: PreTrainedConfig, family: Family, remaining: Sequence[int], depth: int) -> dict[str, Any]:
    changes: dict[str, Any] = {"num_hidden_layers": len(remaining)}
    for name, value in vars(config).items():
        if not isinstance(value, (list, tuple)) or name in _OTHER_LISTS:
            continue
        if name in family.index_lists:
            changes[name] = [new for new, old in enumerate(remaining) if old in value]
        elif len(value) == depth:
            changes[name] = [value[i] for i in remaining]
    return changes


def _apply(config: PreTrainedConfig, changes: Mapping[str, Any]) -> None:
    for name, value in changes.items():
        setattr(config, name, value)


def _require_same_layers(
    model_class: type[PreTrainedModel], before: PreTrainedConfig, after: PreTrainedConfig, remaining: Sequence[int]
) -> None:
    """Raise unless the layers of a model of ``after`` equal the ``remaining`` layers of a model of ``before``.

    Both models are made as if their configurations had been saved and loaded.
    """
    try:
        before_model, after_model = (
            skeleton(type(config).from_dict(config.to_dict()), model_class) for config in (before, after)
        )
    except (ValueError, StrictDataclassError) as error:  # of the configuration's own checks
        raise UnsupportedModelError(
            f"the configuration of {model_class.__name__} cannot express this removal: {one_line(error)}. Remove other "
            "layers, or compress these instead."
        ) from error
    (old_layers, _, family), (new_layers, _, _) = decoder(before_model), decoder(after_model)
    shapes, others = _shapes_outside(before_model), _shapes_outside(after_model)
    if unlike := [name for name in shapes | others if shapes.get(name) != others.get(name)]:
        raise UnsupportedModelError(
            f"{unlike[0]} of {model_class.__name__} has a part for each layer, and removal does not change it; "
            "compress the layers instead."
        )
    for new, old in enumerate(remaining):
        expected, got = _description(old_layers[old], family), _description(new_layers[new], family)
        if expected != got:
            name = next(key for key in expected | got if expected.get(key) != got.get(key))
            raise UnsupportedModelError(
                f"layer {old} of {model_class.__name__} cannot become layer {new}: its {name} is "
                f"{expected.get(name, 'set')} there and {got.get(name, 'absent')} here, and the configuration of this "
                "family cannot express that. Remove other layers, or compress these instead."
            )


def _shapes_outside(model: PreTrainedModel) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters outside of the decoder layers."""
    inside = set(decoder(model).layers.parameters())
    return {name: tuple(p.shape) for name, p in model.named_parameters() if p not in inside}


def _description(layer: nn.Module, family: Family) -> dict[str, object]:
    """The shapes of a layer's parameters, and the plain attributes of its modules except the layer's index."""
    values: dict[str, object] = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    for path, module in layer.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (bool, int, float, str, type(None))) and name not in family.index_names:
                values[f"{path}.{name}".lstrip(".")] = value
    return values
