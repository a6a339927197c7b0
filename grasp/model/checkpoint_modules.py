"""The modules of a checkpoint: built without data before transformers loads it, and checked before and after."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from grasp.errors import CheckpointError
from grasp.method.ranks import Shape
from grasp.method.storage import Storage
from grasp.model.checkpoint_format import StoredTensor, check_rank, check_tensor, storages
from grasp.model.dense import dense_shape
from grasp.model.lowrank_linear import LowRankLinear, Pivotable, order_objection
from grasp.model.narrowing import empty_linear, mark_narrowed
from grasp.model.quantized_linear import (
    QUANTIZED,
    VALUES,
    QuantizedLinear,
    QuantizedModule,
    quantized_like,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from grasp.model.hf_quantizer import GraspQuantizationConfig

_FILE_DTYPES = {**{dtype: name for name, dtype in VALUES.items()}, torch.int32: "I32"}


def lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    """The low-rank linears with floating factors, with their paths."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def compressed_modules(model: nn.Module) -> Iterator[tuple[str, LowRankLinear | QuantizedModule]]:
    """The modules that a configuration names, with their paths: low-rank, quantised, or both."""
    kinds = (LowRankLinear, *QUANTIZED)
    return ((name, module) for name, module in model.named_modules() if isinstance(module, kinds))


def build_(model: PreTrainedModel, config: GraspQuantizationConfig) -> None:
    """Replace modules of a dense model by those that its configuration names. Neither have data.

    Raises:
        CheckpointError: if the model has no such modules, or they cannot have these shapes, ranks and storages.
    """
    paths = {path for path, _ in model.named_modules()}
    for name, shape in config.shapes.items():
        path = _resolve(model, name, paths, "shapes")
        model.set_submodule(path, _empty_linear(name, model.get_submodule(path), shape))
        mark_narrowed(model.get_submodule(path.rpartition(".")[0]))
    for name, rank in config.ranks.items():
        path = _resolve(model, name, paths, "ranks")
        model.set_submodule(path, _empty_layer(name, model.get_submodule(path), rank, name in config.pivoted))
    for path, storage in _quantized_paths(model, config.quantized, paths).items():
        model.set_submodule(path, _empty_quantized(path, model.get_submodule(path), storage))
    tie_scales_(model)


def tie_scales_(model: PreTrainedModel) -> None:
    """Tell transformers that modules that share quantised values share their scales."""
    for layer, source in _tied_modules(model):
        if all(isinstance(model.get_submodule(path), QUANTIZED) for path in (layer, source)):
            model.all_tied_weights_keys[f"{layer}.weight_scales"] = f"{source}.weight_scales"


def check_headers(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``CheckpointError`` if a stored tensor does not fit its rank or storage, or its module has none."""
    for path, layer in compressed_modules(model):
        state = layer.state_dict()
        for name, tensor in state.items():
            for spelling in _spellings(model, f"{path}.{name}"):
                if spelling in tensors:
                    check_tensor(spelling, tensors[spelling], tuple(tensor.shape), _FILE_DTYPES.get(tensor.dtype))
        for spelling in _spellings(model, f"{path}.order"):
            if spelling in tensors and "order" not in state:
                raise CheckpointError(
                    f"the checkpoint has {spelling}, but pivoted in config.json does not name {path}; save the model "
                    "again"
                )
    modules = dict(model.named_modules())
    for name in tensors:
        path, _, tensor = name.rpartition(".")
        module = next((modules[spelling] for spelling in _spellings(model, path) if spelling in modules), None)
        if tensor in ("U", "Vh") and isinstance(module, (nn.Linear, Conv1D, QuantizedLinear)):
            raise CheckpointError(
                f"the checkpoint has the factor {name}, but config.json has no rank for {path}; save the model again"
            )
        if tensor.endswith("_scales") and module is not None and not isinstance(module, QUANTIZED):
            raise CheckpointError(
                f"the checkpoint has {name}, but quantized in config.json does not name {path}; save the model again"
            )


def check_complete(model: PreTrainedModel, names: Collection[str]) -> None:
    """Raise ``CheckpointError`` if transformers has not read a tensor, and it is none of the ``names`` in the files."""
    missing = [
        f"{path}.{name}"
        for path, module in compressed_modules(model)
        for name, tensor in module.state_dict(keep_vars=True).items()
        # transformers sets the flag on tensors that it has read, and leaves offloaded ones on the meta device.
        if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
        and not any(spelling in names for spelling in _spellings(model, f"{path}.{name}"))
    ]
    if missing:
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors that its config.json requires, for example {missing[0]}; "
            "expected U, Vh and any bias of every module in ranks, and values and scales of every module in quantized. "
            "The checkpoint is incomplete: save or copy it again."
        )


def check_loaded(path: str, layer: LowRankLinear | QuantizedModule) -> None:
    """Raise ``CheckpointError`` if the kernels cannot take loaded tensors; those in memory have no header."""
    if isinstance(layer, Pivotable) and layer.order is not None:
        _check_order(path, layer, layer.order)
    if isinstance(layer, LowRankLinear):
        return
    for name, tensor in layer.named_parameters():
        if isinstance(tensor, DTensor):
            raise CheckpointError(
                f"{path} is quantised and cannot be split over processes; load it on one device, or load the "
                "checkpoint that it was made from"
            )
        expected = layer.storage.dtype if name in layer.counts else None
        if _FILE_DTYPES.get(tensor.dtype) != expected:
            raise CheckpointError(
                f"{path}.{name} has the dtype {tensor.dtype}; expected {expected or 'a floating one'}. Save it again."
            )


def _check_order(path: str, layer: Pivotable, order: Tensor) -> None:
    """Raise ``CheckpointError`` if the kernels would write outside of an output, or not write all of it."""
    if order.is_meta:
        raise CheckpointError(
            f"{path}.order is on the meta device, so it cannot be checked; load the model without offload_buffers, and "
            "without device_map='meta'"
        )
    if objection := order_objection(order, layer.rank, layer.out_features):
        raise CheckpointError(f"{path}.{objection}; the file was edited or is damaged: save or copy the model again")


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """The names that a tensor may have in the files: with and without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _resolve(model: PreTrainedModel, name: str, paths: set[str], field: str) -> str:
    """The path, one of ``paths``, of the module that the checkpoint calls ``name`` in a field of its configuration."""
    for spelling in _spellings(model, name):
        if spelling in paths:
            return spelling
    raise CheckpointError(
        f"{field} name the module {name}, which {type(model).__name__} does not have; the configuration was edited or "
        "belongs to another kind of model"
    )


def _quantized_paths(
    model: PreTrainedModel, quantized: Mapping[str, Sequence[str]], paths: set[str]
) -> dict[str, Storage]:
    """The storage of each quantised module by its path in the model; a tied module has that of the other one.

    Raises:
        CheckpointError: if the model lacks a module, or tied ones have different storages.
    """
    headless = model.get_output_embeddings() is None  # such as AutoModel; the path of an output layer has no dot
    found: dict[str, Storage] = {}
    for name, storage in storages(quantized).items():
        if not (headless and "." not in name and name not in paths):
            found[_resolve(model, name, paths, "quantized")] = storage
    for pair in _tied_modules(model):
        both = {found[path] for path in pair if path in found}
        if len(both) > 1:
            raise CheckpointError(
                f"quantized has different storages for {pair[0]} and {pair[1]}, which the model ties; save it again"
            )
        found |= {path: storage for path in pair for storage in both}
    return found


def _tied_modules(model: PreTrainedModel) -> list[tuple[str, str]]:
    """The paths of the modules whose weights are tied, usually those of the output layer and the embedding."""
    ties = getattr(model, "all_tied_weights_keys", {}).items()
    return [
        (layer.removesuffix(".weight"), source.removesuffix(".weight"))
        for layer, source in ties
        if layer.endswith(".weight") and source.endswith(".weight")
    ]


def _empty_linear(name: str, dense: nn.Module, shape: Shape) -> nn.Module:
    """A dense linear without data, of another shape than ``dense``, which it replaces."""
    if not isinstance(dense, nn.Linear):
        raise CheckpointError(f"shapes name {name}, a {type(dense).__name__}; expected a linear layer. Save it again.")
    whole, (n, k) = dense_shape(dense), shape
    if n > whole[0] or k > whole[1]:
        raise CheckpointError(f"shapes give {name} {[n, k]}, more than its {[*whole]}; save the model again")
    return empty_linear(dense, shape, "meta")


def _empty_layer(name: str, dense: nn.Module, rank: int, pivoted: bool) -> LowRankLinear:
    """A low-rank layer without data that replaces ``dense``."""
    if not isinstance(dense, (nn.Linear, Conv1D)):
        raise CheckpointError(f"ranks name {name}, a {type(dense).__name__}; expected a linear layer. Save it again.")
    check_rank(name, rank, dense_shape(dense), pivoted=pivoted)
    layer = LowRankLinear.like(dense, rank, pivoted=pivoted, device="meta")
    # While a model loads, GPT-2's initialisation reads `weight` of linears that it knows by name. This one has no data,
    # is not a parameter, and counts as initialised.
    placeholder = dense.weight.detach()
    placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
    layer.__dict__["weight"] = placeholder
    return layer


def _empty_quantized(path: str, module: nn.Module, storage: Storage) -> QuantizedModule:
    """A quantised module without data that replaces ``module``."""
    layer = quantized_like(module, storage, device="meta")
    if layer is None or layer.storage != storage:
        expected = "a linear layer or an embedding" if layer is None else layer.storage
        raise CheckpointError(
            f"quantized names {path}, a {type(module).__name__}, for {storage}; expected {expected}. Save it again."
        )
    if "weight" in module.__dict__:  # the placeholder of ``_empty_layer``
        layer.__dict__["weight"] = module.__dict__["weight"]
    return layer.train(module.training)
