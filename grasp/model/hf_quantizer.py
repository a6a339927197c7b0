"""The checkpoint format for transformers: a quantisation method whose configuration has the ranks.

Importing this module registers the format. ``grasp_autoload`` imports it while ``import transformers`` runs, so its own
imports must stay light.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, fields
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.quantizers import (  # type: ignore[attr-defined]  # documented, not in __all__
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.ranks import Shape
from grasp.model.checkpoint_format import (
    FORMAT_VERSION,
    METHOD,
    NARROWED_VERSION,
    PIVOTED_VERSION,
    QUANTIZED_VERSION,
    VERSIONS,
    check_format,
    read_headers,
)
from grasp.model.checkpoint_modules import (
    build_,
    check_complete,
    check_headers,
    check_loaded,
    compressed_modules,
    lowrank_layers,
    tie_scales_,
)
from grasp.model.dequantize import dequantize_
from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear, Pivotable
from grasp.model.narrowing import narrowed_shapes
from grasp.model.quantized_linear import QuantizedLinear
from grasp.model.tensor_parallel import connect_, is_split, keep_factors_whole_

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

# In ``config.json`` as the name of the weights. Without this format transformers raises an error that ends in it; else
# it would give the compressed modules random weights.
NEEDS_GRASP = "install grasp-llm, or `import grasp` before loading where TORCH_DEVICE_BACKEND_AUTOLOAD=0"


@dataclass(repr=False)
class GraspQuantizationConfig(QuantizationConfigMixin):
    """The ``quantization_config`` in ``config.json`` of a compressed model: ``ranks`` maps paths of modules to their R.

    ``pivoted`` lists the paths of the pivoted ones. ``quantized`` maps storages, such as ``"int8"`` and ``"int4/64"``
    (4 bits, 64 columns per scale), to the paths of the modules with them, low-rank or not. ``shapes`` maps the paths of
    linears with fewer inputs or outputs than the architecture has there, those of narrowed MLPs, to [N, K]. With it the
    version is 4, else with quantised modules 3, else with pivoted ones 2; the others have version 1, which older
    versions of grasp read.

    Raises:
        CheckpointError: as ``check_format``.
    """

    quant_method: str = METHOD  # type: ignore[assignment]  # the base class's enum has only the built-in methods
    format_version: int = FORMAT_VERSION
    ranks: dict[str, int] = field(default_factory=dict)
    pivoted: list[str] = field(default_factory=list)
    quantized: dict[str, list[str]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_format(self.format_version, self.ranks, self.pivoted, self.quantized, self.shapes)

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values, without an empty ``pivoted``, ``quantized`` and ``shapes``."""
        values: dict[str, Any] = super().to_dict()
        return {key: value for key, value in values.items() if value or key not in ("pivoted", "quantized", "shapes")}

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
    """Builds the low-rank and quantised modules of a checkpoint while transformers loads it; it quantises nothing."""

    quantization_config: GraspQuantizationConfig

    def __init__(self, quantization_config: GraspQuantizationConfig, pre_quantized: bool = True) -> None:
        super().__init__(quantization_config, pre_quantized=pre_quantized)
        self._tensor_names: frozenset[str] = frozenset()  # in the files, while they are loaded

    def is_serializable(self) -> bool:
        """Every compressed model can be saved, since its tensors are ordinary parameters."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors can be trained like any parameter, unless they are quantised."""
        return not self.quantization_config.quantized

    is_qat_trainable = is_trainable  # transformers' Trainer reads this for training without adapters

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

    def update_attn_implementation(self, config: PreTrainedConfig) -> PreTrainedConfig:
        """Remove ``NEEDS_GRASP``; transformers calls this before it looks for the weights."""
        if not str(getattr(config, "transformers_weights", "")).endswith((".safetensors", ".safetensors.index.json")):
            config.__dict__.pop("transformers_weights", None)
        return config

    update_tp_plan = update_attn_implementation  # which transformers 5.17 calls there

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The dtype that a tensor is cast to; never that of quantised values."""
        values = dtype is not None and (dtype.itemsize == 1 or not dtype.is_floating_point)
        return None if values else super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> PreTrainedModel:
        config = self.quantization_config
        tensors = read_headers(file for file in checkpoint_files or () if str(file).endswith(".safetensors"))
        self._tensor_names = frozenset(tensors)
        build_(model, config)
        check_headers(model, tensors)
        keep_factors_whole_(model.tp_plan, [path for path, _ in lowrank_layers(model)])
        return model

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        names, self._tensor_names = self._tensor_names, frozenset()
        check_complete(model, names)
        for path, layer in compressed_modules(model):
            layer.__dict__.pop("weight", None)
            check_loaded(path, layer)
            if isinstance(layer, LowRankLinear):
                connect_(path, layer)
            else:
                layer.requires_grad_(False)
            if isinstance(layer, QuantizedLinear):
                layer.renew_buffers_()
        mark_compressed(model)
        split = any(is_split(layer) for _, layer in lowrank_layers(model))
        group_linears_(model, enabled=not split)  # a layer has its local parts only during its own call
        return model

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[None, dict[str, str]]:
        """Update the modules in the configuration; ``save_pretrained`` calls this first."""
        mark_compressed(model)
        return None, {}

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> PreTrainedModel:
        """Replace low-rank and quantised modules by those of the architecture; called as ``model.dequantize()``.

        Args:
            model: changed in place.
            dtype: of the whole model; ``None`` keeps the dtype of each layer.

        Raises:
            CheckpointError: if weights are offloaded or split, or the configuration does not describe the model.
        """
        dequantize_(model)
        self.remove_quantization_config(model)
        return model if dtype is None else nn.Module.to(model, dtype)

    def remove_quantization_config(self, model: PreTrainedModel) -> None:
        """Remove every mark of compression from the model."""
        super().remove_quantization_config(model)
        model.config.__dict__.pop("_is_quantized", None)


def register() -> None:
    """Add the format to transformers' tables. Idempotent."""
    for add, kind in (
        (register_quantization_config, GraspQuantizationConfig),
        (register_quantizer, GraspHfQuantizer),
    ):
        with suppress(ValueError):  # it is registered already
            add(METHOD)(kind)


def mark_compressed(model: PreTrainedModel) -> None:
    """Write ranks and storages into ``model.config``, so that ``model.save_pretrained`` writes a checkpoint that loads.

    A model without low-rank, quantised and narrowed modules loses every mark of compression.

    Raises:
        CheckpointError: if the model is quantised by another method.
    """
    low_rank = {name: module for name, module in compressed_modules(model) if isinstance(module, Pivotable)}
    pivoted = [name for name, layer in low_rank.items() if layer.order is not None]
    quantized: dict[str, list[str]] = {}
    for name, module in compressed_modules(model):
        if not isinstance(module, LowRankLinear):
            quantized.setdefault(str(module.storage), []).append(name)
    quantizer = getattr(model, "hf_quantizer", None)
    shapes = narrowed_shapes(model)
    if not low_rank and not quantized and not shapes:
        if isinstance(quantizer, GraspHfQuantizer) or quantization_method(model.config) == METHOD:
            GraspHfQuantizer(GraspQuantizationConfig()).remove_quantization_config(model)
        elif quantizer is None:
            model.config.__dict__.pop("_is_quantized", None)  # of a quantisation that has failed
        return
    if quantizer is not None and not isinstance(quantizer, GraspHfQuantizer):
        raise CheckpointError(
            f"the model is quantised ({type(quantizer).__name__}); expected an unquantised model. Load it unquantised."
        )
    versions = {NARROWED_VERSION: shapes, QUANTIZED_VERSION: quantized, PIVOTED_VERSION: pivoted}
    _watch_saving()
    config = GraspQuantizationConfig(
        format_version=next((version for version, modules in versions.items() if modules), FORMAT_VERSION),
        ranks={name: layer.rank for name, layer in low_rank.items()},
        pivoted=pivoted,
        quantized=quantized,
        shapes=shapes,
    )
    loaded = quantizer is not None and quantizer.pre_quantized
    marks = {
        "hf_quantizer": GraspHfQuantizer(config, pre_quantized=loaded),
        "quantization_method": METHOD,
        # Floating parameters are ordinary ones. transformers refuses .float(), .half() and training if this is true.
        "is_quantized": bool(quantized),
        "_weight_conversions": _apart(_conversions(model), config),  # ``save_pretrained`` reverts these
    }
    for name, value in marks.items():
        setattr(model, name, value)
    tie_scales_(model)
    model.config.quantization_config = config
    model.config._is_quantized = True  # some attention modules check this before they read `q_proj.weight`


@functools.cache
def _watch_saving() -> None:
    """Let ``save_pretrained`` of compressed models write ``NEEDS_GRASP``, and weights with the mode of ``config.json``.

    transformers has no hook for either, and safetensors lets only their owner read weights.
    """
    from transformers import PreTrainedModel

    save = PreTrainedModel.save_pretrained

    @functools.wraps(save)
    def watched(model: PreTrainedModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        own, path = model.config.__dict__, Path(save_directory) / "config.json"
        saved = []

        def save_config(*args: Any) -> None:  # only where transformers saves it: not beside an adapter
            del own["save_pretrained"]
            model.config.save_pretrained(*args)
            if quantization_method(model.config) == METHOD:
                values = json.loads(path.read_text(encoding="utf-8")) | {"transformers_weights": NEEDS_GRASP}
                path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
                saved.append(path)

        if isinstance(getattr(model, "hf_quantizer", None), GraspHfQuantizer):
            own["save_pretrained"] = save_config
        try:
            save(model, save_directory, *args, **kwargs)
        finally:
            own.pop("save_pretrained", None)
        for weights in path.parent.glob("*.safetensors") if saved else ():
            weights.chmod(path.stat().st_mode)

    setattr(PreTrainedModel, "save_pretrained", watched)  # noqa: B010 - mypy refuses another signature


def _conversions(model: PreTrainedModel) -> Sequence[Any]:
    """The conversions that the model was loaded with; of a model that was not, those of its architecture."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import PrefixChange

    used: Sequence[Any] | None = getattr(model, "_weight_conversions", None)
    if used is not None:
        return used
    every = get_model_conversion_mapping(model, add_legacy=False)
    return [conversion for conversion in every if not isinstance(conversion, PrefixChange)]


def _apart(conversions: Sequence[Any], config: GraspQuantizationConfig) -> list[Any]:
    """The conversions of a checkpoint's tensors, but those that join, split or rename tensors of a compressed module.

    They may join q, k and v to one matrix, which factors of different ranks cannot become. What they would have changed
    is stored, and loaded, under the names of the modules, as ``quantization_config`` has them.
    """
    from transformers import WeightConverter

    paths = {*config.ranks, *chain.from_iterable(config.quantized.values())}
    names = [f"{path}.{tensor}" for path in paths for tensor in ("weight", "U", "Vh")]

    def is_apart(conversion: Any) -> bool:
        joins = isinstance(conversion, WeightConverter)
        if joins and len(conversion.source_patterns) == len(conversion.target_patterns) == 1:
            return True
        reverse = conversion.reverse_transform()
        renamed = ((name, *reverse.rename_source_key(name)) for name in names)
        return all(pattern is None if joins else new == name for name, new, pattern in renamed)

    return [conversion for conversion in conversions if is_apart(conversion)]


def quantization_method(config: PreTrainedConfig) -> str | None:
    """The quantisation method in a model's configuration; the configuration may have a plain dictionary of it."""
    method = getattr(config, "quantization_config", None) or {}
    return method.get("quant_method") if isinstance(method, dict) else method.quant_method


def low_rank_in(config: PreTrainedConfig) -> GraspQuantizationConfig:
    """The part of a model's configuration about low-rank and quantised modules; without any for a dense model.

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


def require_floating(config: PreTrainedConfig) -> None:
    """Refuse the configuration of a model with quantised modules.

    Raises:
        UnsupportedModelError: if there are any.
    """
    if quantized := low_rank_in(config).quantized:
        raise UnsupportedModelError(
            f"the model is quantised ({', '.join(quantized)}); expected floating weights. Give the model that it was "
            "made from"
        )


register()
