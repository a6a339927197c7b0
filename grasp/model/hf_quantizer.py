"""The checkpoint format for transformers: a quantisation method whose configuration has the ranks.

Importing this module registers the format. ``grasp_autoload`` imports it while ``import transformers`` runs, so its own
imports must stay light.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.model.checkpoint_format import (
    FORMAT_VERSION,
    METHOD,
    PIVOTED_VERSION,
    VERSIONS,
    StoredTensor,
    check_factor,
    check_rank,
    check_ranks,
    read_headers,
)
from grasp.model.dense import DenseLinear, dense_shape
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear, is_order
from grasp.model.skeleton import skeleton
from grasp.model.tensor_parallel import connect_, is_split, keep_factors_whole_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(repr=False)
class GraspQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` in ``config.json`` of a compressed model: ``ranks`` maps paths of modules to their R.

    ``pivoted`` lists the paths of the pivoted ones. A configuration with one has version 2, and one without has
    version 1, which older versions of grasp read.

    Raises:
        CheckpointError: as ``check_ranks``.
    """

    quant_method: str = METHOD  # type: ignore[assignment]  # the base class's enum has only the built-in methods
    format_version: int = FORMAT_VERSION
    ranks: dict[str, int] = field(default_factory=dict)
    pivoted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_ranks(self.format_version, self.ranks, self.pivoted)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without an empty ``pivoted``."""
        values: dict[str, Any] = super().to_dict()
        return values if self.pivoted else {key: value for key, value in values.items() if key != "pivoted"}

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> GraspQuantizationConfig:
        """Read the ``quantization_config`` of a ``config.json``; the other arguments go to the base class.

        Raises:
            CheckpointError: as the constructor does, and if there are unknown keys.
        """
        version = config_dict.get("format_version")
        unknown = config_dict.keys() - {f.name for f in fields(cls)}
        if version in VERSIONS and unknown:
            raise CheckpointError(f"quantization_config has unknown keys {sorted(unknown)}; upgrade grasp-llm")
        known = {key: value for key, value in config_dict.items() if key not in unknown}
        return super().from_dict({"format_version": None, **known}, return_unused_kwargs, **kwargs)


class GraspHfQuantizer(HfQuantizer):
    """Builds the low-rank layers of a checkpoint while transformers loads it; it does not quantise anything."""

    quantization_config: GraspQuantizationConfig

    def __init__(self, quantization_config: GraspQuantizationConfig, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._tensor_names: frozenset[str] = frozenset()  # in the files, while they are loaded

    def is_serializable(self) -> bool:
        """Every compressed model can be saved, since the factors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """The factors can be trained like any parameter."""
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """The factors can be trained; transformers' Trainer reads this for training without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The op is registered for ``torch.compile``."""
        return True

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise if the checkpoint is dense; the arguments are those of the base class and are not used."""
        if not self.pre_quantized:
            raise CheckpointError(
                "a GraspQuantizationConfig was given for a checkpoint that is not compressed; load the checkpoint "
                "without it, then call grasp.compress_"
            )

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        tensors = read_headers(file for file in checkpoint_files or () if str(file).endswith(".safetensors"))
        self._tensor_names = frozenset(tensors)
        paths = {path for path, _ in model.named_modules()}
        for name, rank in self.quantization_config.ranks.items():
            path = _resolve(model, name, paths)
            pivoted = name in self.quantization_config.pivoted
            model.set_submodule(path, _empty_layer(name, model.get_submodule(path), rank, pivoted))
        _check_factors(model, tensors)
        keep_factors_whole_(model.tp_plan, [path for path, _ in _lowrank_layers(model)])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        names, self._tensor_names = self._tensor_names, frozenset()
        missing = [
            f"{path}.{name}"
            for path, module in _lowrank_layers(model)
            for name, tensor in module.state_dict(keep_vars=True).items()
            # transformers sets the flag on tensors that it has read, and leaves offloaded ones on the meta device.
            if not (tensor.is_meta or getattr(tensor, "_is_hf_initialized", False))
            and not any(spelling in names for spelling in _spellings(model, f"{path}.{name}"))
        ]
        if missing:
            raise CheckpointError(
                f"the checkpoint lacks {len(missing)} tensors that its ranks require, for example {missing[0]}; "
                "expected U, Vh and any bias of every module in ranks. The checkpoint is incomplete: save or copy it "
                "again."
            )
        for path, layer in _lowrank_layers(model):
            _check_order(path, layer)
            layer.__dict__.pop("weight", None)
            connect_(path, layer)
        mark_compressed(model)
        split = any(is_split(layer) for _, layer in _lowrank_layers(model))
        group_linears_(model, enabled=not split)  # a layer has its local parts only during its own call
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Update the ranks in the configuration; ``save_pretrained`` calls this first."""
        mark_compressed(model)
        return None, {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace every low-rank layer by a dense layer of the architecture; called as ``model.dequantize()``.

        Args:
            model: changed in place.
            dtype: of the whole model; ``None`` keeps the dtype of each layer.

        Raises:
            CheckpointError: if weights are offloaded or split, or the configuration does not describe the model.
        """
        model = self._dequantize(model)
        self.remove_quantization_config(model)
        return model if dtype is None else nn.Module.to(model, dtype)

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        originals = dict(skeleton(model.config, type(model)).named_modules())
        for name, layer in list(_lowrank_layers(model)):
            if layer.U.is_meta or is_split(layer):
                place = "offloaded" if layer.U.is_meta else "split over processes"
                raise CheckpointError(f"{name} is {place}; load the model on one device to dequantize it")
            dense = originals.get(name)
            if not isinstance(dense, (nn.Linear, Conv1D)):
                raise CheckpointError(
                    f"{name} is not a linear layer in the model that model.config describes; make model.config fit "
                    "the model, num_hidden_layers in particular"
                )
            model.set_submodule(name, _dense_layer(dense, layer))
        group_linears_(model, enabled=False)  # the MLPs get their own classes again
        return model

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove every mark of compression from the model."""
        super().remove_quantization_config(model)
        model.config.__dict__.pop("_is_quantized", None)


def register() -> None:
    """Add the format to transformers' tables. Idempotent."""
    AUTO_QUANTIZATION_CONFIG_MAPPING.setdefault(METHOD, GraspQuantizationConfig)
    AUTO_QUANTIZER_MAPPING.setdefault(METHOD, GraspHfQuantizer)


def mark_compressed(model: PreTrainedModel) -> None:
    """Write the current ranks into ``model.config``, so that ``model.save_pretrained`` writes a checkpoint that loads.

    A model without low-rank layers loses every mark of compression.

    Raises:
        CheckpointError: if the model is quantised by another method.
    """
    ranks = {name: layer.rank for name, layer in _lowrank_layers(model)}
    pivoted = [name for name, layer in _lowrank_layers(model) if layer.order is not None]
    quantizer = getattr(model, "hf_quantizer", None)
    if not ranks:
        if isinstance(quantizer, GraspHfQuantizer) or quantization_method(model.config) == METHOD:
            GraspHfQuantizer(GraspQuantizationConfig()).remove_quantization_config(model)
        return
    if quantizer is not None and not isinstance(quantizer, GraspHfQuantizer):
        raise CheckpointError(
            f"the model is quantised ({type(quantizer).__name__}); expected an unquantised model. Load it unquantised."
        )
    version = PIVOTED_VERSION if pivoted else FORMAT_VERSION
    config = GraspQuantizationConfig(format_version=version, ranks=ranks, pivoted=pivoted)
    loaded = quantizer is not None and quantizer.pre_quantized
    marks = {
        "hf_quantizer": GraspHfQuantizer(config, pre_quantized=loaded),
        "quantization_method": METHOD,
        # The parameters are ordinary ones. transformers refuses .float(), .half() and training if this is true.
        "is_quantized": False,
    }
    for name, value in marks.items():
        setattr(model, name, value)
    model.config.quantization_config = config
    model.config._is_quantized = True  # some attention modules check this before they read `q_proj.weight`


def quantization_method(config: PreTrainedConfig) -> str | None:
    """The quantisation method in a model's configuration; the configuration may have a plain dictionary of it."""
    method = getattr(config, "quantization_config", None) or {}
    return method.get("quant_method") if isinstance(method, dict) else method.quant_method


def low_rank_in(config: PreTrainedConfig) -> GraspQuantizationConfig:
    """The part of a model's configuration about low-rank layers; without ranks for a dense model.

    Raises:
        UnsupportedModelError: if the model is quantised by another method.
        CheckpointError: if a rank is not a positive integer.
    """
    quantization = getattr(config, "quantization_config", None)
    if not quantization:
        return GraspQuantizationConfig()
    if (method := quantization_method(config)) != METHOD:
        raise UnsupportedModelError(f"the model is quantised ({method}); expected a dense one. Load it unquantised.")
    if isinstance(quantization, dict):
        return GraspQuantizationConfig.from_dict(quantization)
    return quantization


def _lowrank_layers(model: nn.Module) -> Iterator[tuple[str, LowRankLinear]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, LowRankLinear))


def _spellings(model: PreTrainedModel, name: str) -> tuple[str, ...]:
    """The names that a tensor may have in the files: with and without the prefix of the base model."""
    prefix = f"{model.base_model_prefix}."
    return name, prefix + name, name.removeprefix(prefix)


def _resolve(model: PreTrainedModel, name: str, paths: set[str]) -> str:
    """The path, one of ``paths``, of the module that the checkpoint calls ``name``."""
    for spelling in _spellings(model, name):
        if spelling in paths:
            return spelling
    raise CheckpointError(
        f"ranks name the module {name}, which {type(model).__name__} does not have; the configuration was edited or "
        "belongs to another kind of model"
    )


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


def _dense_layer(dense: DenseLinear, layer: LowRankLinear) -> DenseLinear:
    """``dense``, a layer without data, with the weight of ``layer``."""
    dense = dense.to(layer.U.dtype).to_empty(device=layer.U.device).train(layer.training)
    weight = layer.dense_weight()
    with torch.no_grad():
        dense.weight.copy_(weight.mT if isinstance(dense, Conv1D) else weight)
        if layer.bias is not None:
            dense.bias.copy_(layer.bias)
    return dense.requires_grad_(layer.U.requires_grad)


def _check_order(path: str, layer: LowRankLinear) -> None:
    """Raise ``CheckpointError`` if the kernels would write outside of an output, or not write all of it."""
    order = layer.order
    if order is None:
        return
    if order.is_meta:
        raise CheckpointError(f"{path}.order is offloaded; load the model without offload_buffers")
    if order.dtype != torch.int32 or not is_order(order, layer.rank):
        raise CheckpointError(
            f"{path}.order is not the order of pivoted factors: {layer.rank} distinct rows of 0..{len(order) - 1}, "
            "ascending, then the others; the file was edited or is damaged: save or copy the model again"
        )


def _check_factors(model: PreTrainedModel, tensors: Mapping[str, StoredTensor]) -> None:
    """Raise ``CheckpointError`` if a stored factor does not fit its rank, or has none."""
    for path, layer in _lowrank_layers(model):
        for name, tensor in layer.state_dict().items():
            for spelling in _spellings(model, f"{path}.{name}"):
                if spelling in tensors:
                    check_factor(spelling, tensors[spelling], tuple(tensor.shape))
        for spelling in _spellings(model, f"{path}.order"):
            if spelling in tensors and layer.order is None:
                raise CheckpointError(
                    f"the checkpoint has {spelling}, but pivoted in config.json does not name {path}; save the model "
                    "again"
                )
    dense = {name for name, module in model.named_modules() if isinstance(module, (nn.Linear, Conv1D))}
    for name in tensors:
        path, _, tensor = name.rpartition(".")
        if tensor in ("U", "Vh") and any(spelling in dense for spelling in _spellings(model, path)):
            raise CheckpointError(
                f"the checkpoint has the factor {name}, but config.json has no rank for {path}; save the model again"
            )


register()
