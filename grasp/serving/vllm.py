"""The checkpoint format for vLLM, which calls ``register`` through the entry point ``vllm.general_plugins``.

Only vLLM imports this module. A linear with a rank in ``config.json`` becomes a low-rank linear; it, a dense linear or
an embedding may be quantised. vLLM merges some linears, such as q, k and v. One call of
``grasp::lowrank_linear_merged`` computes a merged linear, its dense parts included. In an MLP whose gate and up are
low-rank, ``grasp::lowrank_glu`` computes them and the activation. The ops are opaque to ``torch.compile`` and do not
synchronise with the GPU, so CUDA graphs can record them.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    LinearMethodBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.utils import set_weight_attrs
from vllm.platforms import current_platform

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.storage import Storage
from grasp.model.checkpoint_format import METHOD, check_rank, storages
from grasp.model.hf_quantizer import GraspQuantizationConfig
from grasp.serving.parts import NAMES, Part, Spec
from grasp.serving.shards import (
    WHOLE,
    LocalLinear,
    Piece,
    linear_index,
    linear_names,
    merged_linears,
    output_pieces,
)
from grasp.serving.vllm_dense import Run, make_runs, one_run, renew_
from grasp.serving.vllm_embedding import GraspEmbeddingMethod, watch_embeddings
from grasp.serving.vllm_mlp import fuse_gate_, watch_parents
from grasp_kernels import Dense, Factors, lowrank_glu, lowrank_linear, lowrank_linear_merged, warm_up
from grasp_kernels.packing import RANK_MULTIPLE
from grasp_kernels.quantized import dequantize


class GraspVllmConfig(QuantizationConfig):
    """The ``quantization_config`` of a compressed checkpoint.

    Args:
        ranks: of its low-rank linears.
        pivoted: the pivoted ones of them.
        quantized: the storage of its quantised linears and embeddings.
    """

    def __init__(
        self, ranks: dict[str, int], pivoted: Sequence[str] = (), quantized: Mapping[str, Storage] | None = None
    ) -> None:
        super().__init__()
        self.ranks, self.pivoted, self.quantized = ranks, list(pivoted), dict(quantized or {})

    def get_name(self) -> str:
        """The name in ``config.json``."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that the ops support; vLLM refuses others."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """Any GPU: plain PyTorch runs where no kernel does."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No file other than ``config.json``."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraspVllmConfig:
        """Read the ``quantization_config`` of a ``config.json``.

        Raises:
            CheckpointError: as ``check_format``.
        """
        read = GraspQuantizationConfig.from_dict(dict(config))
        return cls(dict(read.ranks), read.pivoted, storages(read.quantized))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as vLLM renames those of this architecture."""
        self.ranks = hf_to_vllm_mapper.apply_dict(self.ranks)
        self.quantized = hf_to_vllm_mapper.apply_dict(self.quantized)
        self.pivoted = hf_to_vllm_mapper.apply_list(self.pivoted)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that loads and runs a module; vLLM calls this for linears, embeddings, attention and experts.

        Raises:
            UnsupportedModelError: if vLLM has no linear or embedding for a module, or would damage its tensors.
        """
        prefix = prefix.removeprefix("draft_model.")  # of a draft for speculative decoding; no checkpoint has it
        if isinstance(layer, LinearBase):
            names = linear_names(prefix, self.packed_modules_mapping)
            if not any(name in self.ranks or name in self.quantized for name in names):
                return UnquantizedLinearMethod()
            _check_loader(prefix, dense=not any(name in self.ranks for name in names))
            watch_parents()
            return GraspLinearMethod(names, self.ranks, self.pivoted, self.quantized)
        is_int8 = self.quantized.get(prefix) == Storage(8) and prefix not in self.ranks
        if isinstance(layer, VocabParallelEmbedding) and is_int8:
            return GraspEmbeddingMethod(prefix)
        fields: dict[str, Mapping[str, object]] = {"a rank": self.ranks, "a storage": self.quantized}
        for field, modules in fields.items():
            for name in modules:
                expert = name.removeprefix(f"{prefix}.")
                if name == prefix or (expert != name and expert[:1].isdigit()):
                    raise UnsupportedModelError(
                        f"config.json has {field} for {name}, which vLLM serves with {type(layer).__name__}; expected "
                        "linear layers, and embeddings in int8. Compress without it, or serve this model with "
                        "transformers."
                    )
        return None


# Kinds of models → linears whose tensors of some names vLLM reorders or transposes: it would damage factors and scales.
_REORDERED = {"bloom": ("query_key_value",), "llama4_text": ("q_proj", "k_proj", "qkv_proj")}
_TRANSPOSED = {"gpt2": ("c_attn", "c_proj", "c_fc")}  # the weight only


def _check_loader(path: str, dense: bool) -> None:
    """Raise ``UnsupportedModelError`` for a linear whose tensors vLLM's loader of the model would damage."""
    config = get_current_vllm_config_or_none()
    kind = config.model_config.hf_text_config.model_type if config and config.model_config else ""
    names = (*_REORDERED.get(kind, ()), *(_TRANSPOSED.get(kind, ()) if dense else ()))
    if path.rpartition(".")[2] in names:
        raise UnsupportedModelError(
            f"vLLM reorders {path} in models of type {kind}, which is right for a dense floating weight "
            "only; expected one. Compress without it, or serve this model with transformers."
        )


class GraspLinearMethod(LinearMethodBase):
    """A linear of vLLM in which some or all parts are low-rank or quantised.

    It computes ``y_i = (x @ Vh_i.mT) @ U_i.mT + bias_i`` or ``x @ weight_i.mT + bias_i``. ``parts.Part`` says which
    tensors a part has in this process. The layer has a parameter of each name in ``parts.NAMES``, a vector with the
    tensors of all parts, often empty, by which vLLM finds the loaders. The Vh of all parts lie one behind the other,
    so one product with x serves all of them. LoRA needs the attribute ``weight``. On GPUs ranks are padded with zeros
    to a multiple of 16, as in ``grasp_kernels.pack_factors``, but not those of pivoted or quantised parts. Kernels of
    vLLM compute dense quantised parts that are not held as factors. They have their own copy of the weight, so the
    layer's is freed.
    """

    def __init__(
        self,
        names: Sequence[str],
        ranks: Mapping[str, int],
        pivoted: Sequence[str] = (),
        quantized: Mapping[str, Storage] | None = None,
    ) -> None:
        self.names, self.ranks, self.pivoted, self.quantized = names, ranks, pivoted, quantized or {}
        self.parts: tuple[Part, ...] = ()
        self.runs: list[Run] = []
        self.dtype = torch.get_default_dtype()
        self.layer: Callable[[], LinearBase | None] = lambda: None  # the layer refers to this object
        self.waiting: dict[int, dict[str, Tensor]] = {}  # part → tensors that were loaded before its others

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the parameters of the linear; the constructor of the linear calls this once.

        Raises:
            UnsupportedModelError: if the number of the linear's outputs does not fit its parts, only some of them are
                quantised, or the columns of a quantised part cannot be cut at the borders of processes.
            CheckpointError: if a rank is above that of its weight.
        """
        pieces, columns = (WHOLE,) * len(output_partition_sizes), WHOLE
        if isinstance(layer, ColumnParallelLinear):
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            pieces = output_pieces(len(output_partition_sizes), layer.tp_rank, layer.tp_size, replicas)
        elif isinstance(layer, RowParallelLinear):
            columns = Piece(layer.tp_rank, layer.tp_size)
        linears = merged_linears(self.names, self.ranks, output_partition_sizes, pieces, self.pivoted, self.quantized)
        for linear in linears:
            check_rank(linear.name, linear.rank or 0, (linear.checkpoint_rows, input_size), pivoted=linear.pivoted)
        self.parts = tuple(_part(linear, input_size_per_partition, columns) for linear in linears)
        self.runs = [one_run(self.parts)]
        self.dtype, self.layer = params_dtype, weakref.ref(layer)
        # Some architectures reorder loaded tensors along the dimensions named here. The rows of a pivoted U are not
        # outputs; an order that was reordered is refused.
        left = {} if any(part.linear.pivoted for part in self.parts) else {"output_dim": 0}
        dimensions = {
            **{"U": left, "U_scales": left, "Vh": {"input_dim": 1}, "order": {"output_dim": 0}},
            **{"weight": {"input_dim": 1, "output_dim": 0}, "weight_scales": {"output_dim": 0}},
        }
        for name in NAMES:
            parameter = nn.Parameter(self._memory(name), requires_grad=False)
            set_weight_attrs(parameter, {"weight_loader": self._loader(name), **dimensions.get(name, {})})
            layer.register_parameter(name, parameter)

    def _memory(self, name: str) -> Tensor:
        """The parameter of a name before it is loaded: NaN, so that a tensor that the checkpoint lacks is detected."""
        size = sum(spec.numel for spec in self._specs(name))
        if name == "order":  # one that kernels can use, for engines without a checkpoint (`--load-format dummy`)
            return torch.cat([torch.arange(spec.numel, dtype=torch.int32) for spec in self._specs(name)])
        # A quantised weight may be held under another name; a loader of vLLM warns of dtypes that differ.
        dtypes = (specs[name].dtype for part in self.parts for specs in (part.held, part.stored) if name in specs)
        dtype = next(filter(None, dtypes), self.dtype)
        return torch.full((size,), torch.nan if dtype.is_floating_point else 0, dtype=dtype)

    def _specs(self, name: str) -> list[Spec]:
        return [part.held.get(name, Spec((0,))) for part in self.parts]

    def _views(self, name: str, memory: Tensor) -> list[Tensor]:
        """The tensor of each part in the parameter of a name; empty if the part has none.

        Values of 8 and 4 bits have two dtypes of one byte, and lie in one parameter.
        """
        specs = self._specs(name)
        pieces = memory.split([spec.numel for spec in specs])
        return [p.view(spec.dtype or p.dtype).view(spec.shape) for p, spec in zip(pieces, specs, strict=True)]

    def _loader(self, name: str) -> Callable[..., None]:
        """The loader of a parameter. It is a function because vLLM's reloading needs ``__name__``."""

        def load(param: nn.Parameter, loaded_weight: Tensor, shard_id: object = None) -> None:
            self._load(name, param, loaded_weight, shard_id)

        return load

    def _load(self, name: str, param: nn.Parameter, loaded_weight: Tensor, shard_id: object) -> None:
        """Check a tensor of the checkpoint, and fill the parameters of its part once all tensors of it are there."""
        index = linear_index(shard_id, [part.linear for part in self.parts])
        self.parts[index].check(name, loaded_weight)
        loaded = {**self.waiting.pop(index, {}), name: loaded_weight}
        if loaded.keys() < self.parts[index].stored.keys():
            # Some loaders overwrite their buffer with the next tensor.
            self.waiting[index] = {**loaded, name: loaded_weight.clone()}
            return
        layer = self.layer()
        assert layer is not None
        for held, tensor in self.parts[index].make(loaded, param.device).items():
            memory = self._views(held, getattr(layer, held).data)[index]
            if memory.shape != tensor.shape:  # a padded rank
                memory.zero_()
            memory[tuple(slice(size) for size in tensor.shape)].copy_(tensor)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that all tensors were in the checkpoint, give dense quantised parts to vLLM, and compile the kernels.

        To load tensors again, vLLM makes the parameters again first, and calls this method again afterwards.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
        """
        for index, loaded in self.waiting.items():
            part = self.parts[index]
            missing = ", ".join(f"{part.linear.name}.{name}" for name in part.stored if name not in loaded)
            raise CheckpointError(
                f"{missing} is not in the checkpoint; expected {', '.join(part.stored)} of {part.linear.name}. Save or "
                "copy the checkpoint again."
            )
        for name in NAMES:
            for part, tensor in zip(self.parts, self._views(name, getattr(layer, name).data), strict=True):
                if not torch.isfinite(tensor.float() if tensor.dtype.itemsize == 1 else tensor).all():
                    stored = name if name in part.stored else name.replace("Vh", "weight")
                    raise CheckpointError(
                        f"{part.linear.name}.{stored} is not in the checkpoint, or has NaN or infinite entries; "
                        f"expected finite {', '.join(part.stored)}. Save or copy the checkpoint again."
                    )
        self._use_kernels_of_vllm(layer)
        both = len(self.parts) == 2 and all(part.low_rank for part in self.parts) and not _serves_adapters()
        activation = fuse_gate_(layer) if both else None
        if current_platform.is_cuda_alike():
            # vLLM's own dummy runs have only the numbers of rows of its CUDA graphs and its largest batch.
            # A kernel with a bias is another one than without.
            model = functools.partial(self.apply, layer, bias=_passed_bias(layer))
            if activation is not None:
                model = functools.partial(self.gated, layer, activation=activation)
            warm_up(model, torch.zeros(1, self.parts[0].width, dtype=self.dtype, device=layer.Vh.device))

    def _use_kernels_of_vllm(self, layer: LinearBase) -> None:
        """Give dense quantised parts to kernels of vLLM and free their tensors in the layer."""
        values, scales = (self._views(name, getattr(layer, name).data) for name in ("weight", "weight_scales"))
        runs = make_runs(self.parts, values, scales, self.dtype)
        if not any(run.kernel for run in runs):
            return
        self.runs = renew_(self.runs, runs)
        for name in ("weight", "weight_scales"):
            parameter = getattr(layer, name)
            parameter.data = parameter.data.new_empty(0)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., sum of N_i)."""
        if all(part.held.keys() == {"weight"} for part in self.parts):
            return F.linear(x, layer.weight.view(-1, x.shape[-1]), bias)
        outputs = [self._compute(layer, x, None if bias is None else bias[run.outputs], run) for run in self.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _compute(self, layer: LinearBase, x: Tensor, bias: Tensor | None, run: Run) -> Tensor:
        """The outputs of a run, whose bias is given."""
        if run.kernel is not None:
            y = run.kernel(x)
            return y if bias is None else y + bias
        members = self._members(layer, x, bias, run)
        (first, *others) = members
        if others:
            return lowrank_linear_merged(x, members)
        return F.linear(x, *first) if isinstance(first, Dense) else lowrank_linear(x, *first)

    def gated(self, layer: LinearBase, x: Tensor, activation: str) -> Tensor:
        """``act(gate(x)) * up(x)`` by a linear of two low-rank parts of one width: (..., K) → (..., N)."""
        gate, up = self._members(layer, x, _passed_bias(layer), *self.runs)
        return lowrank_glu(x, gate, up, activation=activation)

    def _members(self, layer: LinearBase, x: Tensor, bias: Tensor | None, run: Run) -> list[Any]:
        """The factors of each part of a run that has some, and ``Dense`` of the others."""
        parts = self.parts[run.parts]
        biases = [None] * len(parts) if bias is None else bias.split([part.linear.rows for part in parts])
        used = [name for name in NAMES if any(name in part.held for part in parts)]
        views = {name: self._views(name, getattr(layer, name))[run.parts] for name in used}
        members: list[Any] = []
        for index, (part, b) in enumerate(zip(parts, biases, strict=True)):
            tensors = {name: views[name][index] for name in part.held}
            if "weight" not in tensors:
                none = {} if "U" in tensors else {"U": x.new_empty(0, part.linear.rows)}
                members.append(Factors(s=None, bias=b, **none, **tensors))
            elif "weight_scales" not in tensors:
                members.append(Dense(tensors["weight"], b))
            else:
                weight = dequantize(tensors["weight"], tensors["weight_scales"], part.width, x.dtype)
                members.append(Dense(weight, b))
        return members


def _part(linear: LocalLinear, width: int, columns: Piece) -> Part:
    """A part as the kernels of this platform take it."""
    multiple = RANK_MULTIPLE if current_platform.is_cuda_alike() else 1
    return Part(linear, width, columns, weight_as_factors=current_platform.is_cpu(), rank_multiple=multiple)


def _serves_adapters() -> bool:
    """Whether vLLM adds LoRA adapters, for which it wraps the linears of an MLP after their weights are loaded."""
    config = get_current_vllm_config_or_none()
    return config is not None and config.lora_config is not None


def _passed_bias(layer: LinearBase) -> Tensor | None:
    """The bias that vLLM gives to ``apply`` in this process; it adds the bias of a row-parallel linear once."""
    elsewhere = isinstance(layer, RowParallelLinear) and layer.tp_rank > 0
    return None if layer.skip_bias_add or elsewhere else layer.bias


def register() -> None:
    """Add the format to vLLM's table of quantisation methods. Idempotent."""
    register_quantization_config(METHOD)(GraspVllmConfig)
    watch_embeddings()
