"""The checkpoint format for SGLang, which calls ``register`` through the entry point ``sglang.srt.plugins``.

Only SGLang imports this module. A linear with a rank in ``config.json`` becomes a low-rank linear; it, a dense linear
or an embedding may be quantised. One call of ``grasp::lowrank_linear_merged`` computes a merged linear, such as q, k
and v, its dense parts included. SGLang only logs tensors that no parameter takes, so each linear of the model checks
after loading that it has all of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from sglang.srt.distributed.utils import get_group_rank_size
from sglang.srt.layers.linear import ColumnParallelLinear, LinearBase, ReplicatedLinear, RowParallelLinear
from sglang.srt.layers.quantization import CPU_QUANTIZATION_METHODS, QUANTIZATION_METHODS
from sglang.srt.layers.quantization.base_config import LinearMethodBase, QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.utils import is_cpu, is_cuda_alike
from torch import Tensor, nn

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.ranks import Shape
from grasp.method.storage import Storage
from grasp.model.checkpoint_format import METHOD
from grasp.serving.checkpoint_config import CheckpointConfig
from grasp.serving.embedding_method import QuantizedEmbeddingMethod
from grasp.serving.linear_method import LowRankMethod
from grasp.serving.shards import WHOLE, Piece, linear_names, output_pieces
from grasp_kernels import warm_up

# Most model classes of SGLang do not name the linears that they merge.
_PACKED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
_ADDED = ("packed_modules_mapping", "hf_config")  # what SGLang adds to a quantization_config


class GraspSglangConfig(CheckpointConfig, QuantizationConfig):
    """The ``quantization_config`` of a compressed checkpoint."""

    stack = "SGLang"
    reordered: Mapping[str, Sequence[str]] = {
        "llama4": ("q_proj", "k_proj", "qkv_proj"),
        "deepseek_v2": ("kv_b_proj",),
        "deepseek_v3": ("kv_b_proj",),
    }
    kind = ""  # of the model, in config.json

    def __init__(
        self,
        ranks: dict[str, int],
        pivoted: Sequence[str] = (),
        quantized: Mapping[str, Storage] | None = None,
        shapes: Mapping[str, Shape] | None = None,
    ) -> None:
        super().__init__(ranks, pivoted, quantized, shapes)
        self.packed_modules_mapping: dict[str, list[str]] = dict(_PACKED)
        self.claimed: set[str] = set()  # modules whose method SGLang asked for

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GraspSglangConfig:
        """Read the ``quantization_config`` of a ``config.json``, with what SGLang adds to it.

        Raises:
            CheckpointError: as ``check_format``.
        """
        read: GraspSglangConfig = super().from_config({k: v for k, v in config.items() if k not in _ADDED})
        read.packed_modules_mapping |= config.get("packed_modules_mapping", {})
        model = config.get("hf_config")
        read.kind = getattr(model, "model_type", "")
        if getattr(model, "tie_word_embeddings", False):
            read.claimed.add("lm_head")  # SGLang has the embedding in its place
        return read

    def apply_weight_name_mapper(self, hf_to_sglang_mapper: Any) -> None:
        """Rename the modules as SGLang renames those of this architecture."""
        self.rename(hf_to_sglang_mapper)

    def get_scaled_act_names(self) -> list[str]:
        """No activation is scaled."""
        return []

    def get_cache_scale(self, name: str) -> None:
        """No tensor is a scale of the KV cache."""

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that loads and runs a module; SGLang calls this for linears, embeddings, attention and experts.

        Raises:
            UnsupportedModelError: if SGLang has no linear or embedding for a module, or would damage its tensors.
        """
        if isinstance(layer, LinearBase):
            names = (prefix,) if self.compresses(prefix) else linear_names(prefix, self.packed_modules_mapping)
            self.claimed.update(names)
            if not any(map(self.compresses, names)):
                return DenseLinearMethod(prefix)
            self.refuse_reordered(prefix, names, self.kind)
            return GraspLinearMethod(names, self.ranks, self.pivoted, self.quantized, self.shapes)
        if isinstance(layer, VocabParallelEmbedding) and (storage := self.embedding_storage(prefix)) is not None:
            self.claimed.add(prefix)
            return GraspEmbeddingMethod(prefix, storage)
        self.refuse(layer, prefix)
        return None

    def check_claimed(self) -> None:
        """Refuse quantised tensors that SGLang would load into floating parameters, without their scales.

        Raises:
            UnsupportedModelError: if SGLang did not ask for the method of a quantised module. Many of its architectures
                build their embedding that way. A stage of a pipeline lacks the modules of the others.
        """
        unclaimed = sorted(self.quantized.keys() - self.claimed)
        if unclaimed:
            raise UnsupportedModelError(
                f"config.json has a storage for {', '.join(unclaimed[:3])}, for which SGLang asked no "
                f"plugin in this process; expected a model class that asks for all modules ({self.kind or 'unknown'} "
                "models may not), and no pipeline stages. Serve the checkpoint before `grasp quantize`, or this one "
                "with vLLM or transformers."
            )


class GraspLinearMethod(LowRankMethod, LinearMethodBase):
    """A linear of SGLang in which some or all parts are low-rank or quantised."""

    def local_pieces(self, layer: LinearBase, outputs: int) -> tuple[Sequence[Piece], Piece]:
        """The rows of each output, and the columns, that this process has.

        Raises:
            UnsupportedModelError: if the linear is of another kind than column-parallel, row-parallel and replicated.
        """
        if isinstance(layer, RowParallelLinear):
            return (WHOLE,) * outputs, Piece(*get_group_rank_size(layer.tp_group))
        if isinstance(layer, ColumnParallelLinear):
            rank, size = get_group_rank_size(getattr(layer, "kv_tp_group", layer.tp_group))
            keys = output_pieces(outputs, rank, size, getattr(layer, "num_kv_head_replicas", 1))
            return (Piece(*get_group_rank_size(layer.tp_group)), *keys[1:]), WHOLE
        if isinstance(layer, ReplicatedLinear):
            return (WHOLE,) * outputs, WHOLE
        raise UnsupportedModelError(
            f"config.json compresses {', '.join(self.names)}, which SGLang serves with {type(layer).__name__}; "
            "expected a ColumnParallelLinear, RowParallelLinear or ReplicatedLinear. Compress without it, or serve "
            "this model with transformers."
        )

    def on_cpu(self) -> bool:
        """Whether SGLang runs on a CPU."""
        return bool(is_cpu())

    def on_gpu(self) -> bool:
        """Whether SGLang runs on a GPU of NVIDIA or AMD."""
        return bool(is_cuda_alike())

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that all tensors were in the checkpoint, and compile the kernels.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
            UnsupportedModelError: as ``check_claimed``.
        """
        layer.quant_config.check_claimed()
        self.check_loaded(layer)
        if self.on_gpu():
            model = functools.partial(self.apply, layer, bias=_passed_bias(layer))
            warm_up(model, torch.zeros(1, self.parts[0].width, dtype=self.dtype, device=layer.Vh.device))


class DenseLinearMethod(UnquantizedLinearMethod):
    """A dense linear of SGLang that knows whether its weight was loaded."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def create_weights(self, layer: LinearBase, *arguments: Any, **named: Any) -> None:
        """Create the weight as SGLang does, filled with NaN."""
        super().create_weights(layer, *arguments, **named)
        layer.weight.data.fill_(torch.nan)

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that the weight was in the checkpoint.

        Raises:
            CheckpointError: if it was not, or has NaN or infinite entries.
            UnsupportedModelError: as ``check_claimed``.
        """
        layer.quant_config.check_claimed()
        if not torch.isfinite(layer.weight).all():
            raise CheckpointError(
                f"{self.name}.weight is not in the checkpoint, or has NaN or infinite entries, and config.json has no "
                "rank or storage under the name that SGLang has for it; expected finite weights. Save or copy the "
                "checkpoint again, or serve this model with transformers."
            )
        super().process_weights_after_loading(layer)


class GraspEmbeddingMethod(QuantizedEmbeddingMethod, QuantizeMethodBase):
    """An embedding or output layer of SGLang with quantised rows."""


def _passed_bias(layer: LinearBase) -> Tensor | None:
    """The bias that SGLang gives to ``apply`` in this process; it adds the bias of a row-parallel linear once."""
    elsewhere = isinstance(layer, RowParallelLinear) and get_group_rank_size(layer.tp_group)[0] > 0
    return None if layer.skip_bias_add or elsewhere else layer.bias


def register() -> None:
    """Add the format to SGLang's tables of quantisation methods. Idempotent."""
    QUANTIZATION_METHODS[METHOD] = CPU_QUANTIZATION_METHODS[METHOD] = GraspSglangConfig
