"""The checkpoint format for vLLM, which calls ``register`` through the entry point ``vllm.general_plugins``.

Only vLLM imports this module. A linear with a rank in ``config.json`` becomes a low-rank linear; it, a dense linear or
an embedding may be quantised. vLLM merges some linears, such as q, k and v. One call of
``grasp::lowrank_linear_merged`` computes a merged linear, its dense parts included. In an MLP whose gate and up are
low-rank, ``grasp::lowrank_glu`` computes them and the activation. The ops are opaque to ``torch.compile`` and do not
synchronise with the GPU, so CUDA graphs can record them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
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
from vllm.platforms import current_platform

from grasp.model.checkpoint_format import METHOD
from grasp.serving.checkpoint_config import CheckpointConfig
from grasp.serving.linear_method import LowRankMethod
from grasp.serving.shards import WHOLE, Piece, linear_names, output_pieces
from grasp.serving.vllm_dense import Run, make_runs, renew_
from grasp.serving.vllm_embedding import GraspEmbeddingMethod, watch_embeddings
from grasp.serving.vllm_mlp import fuse_gate_, watch_parents
from grasp_kernels import lowrank_glu, warm_up


class GraspVllmConfig(CheckpointConfig, QuantizationConfig):
    """The ``quantization_config`` of a compressed checkpoint."""

    stack = "vLLM"
    reordered: Mapping[str, Sequence[str]] = {
        "bloom": ("query_key_value",),
        "llama4_text": ("q_proj", "k_proj", "qkv_proj"),
    }

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the modules as vLLM renames those of this architecture."""
        self.rename(hf_to_vllm_mapper)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        """The method that loads and runs a module; vLLM calls this for linears, embeddings, attention and experts.

        Raises:
            UnsupportedModelError: if vLLM has no linear or embedding for a module, or would damage its tensors.
        """
        prefix = prefix.removeprefix("draft_model.")  # of a draft for speculative decoding; no checkpoint has it
        if isinstance(layer, LinearBase):
            names = linear_names(prefix, self.packed_modules_mapping)
            if not any(map(self.compresses, names)):
                return UnquantizedLinearMethod()
            self.refuse_reordered(prefix, names, _kind_of_model())
            watch_parents()
            return GraspLinearMethod(names, self.ranks, self.pivoted, self.quantized, self.shapes)
        if isinstance(layer, VocabParallelEmbedding) and (storage := self.embedding_storage(prefix)) is not None:
            return GraspEmbeddingMethod(prefix, storage)
        self.refuse(layer, prefix)
        return None


def _kind_of_model() -> str:
    config = get_current_vllm_config_or_none()
    return config.model_config.hf_text_config.model_type if config and config.model_config else ""


class GraspLinearMethod(LowRankMethod, LinearMethodBase):
    """A linear of vLLM in which some or all parts are low-rank or quantised.

    LoRA needs the attribute ``weight``. Kernels of vLLM compute dense quantised parts that are not held as factors.
    They have their own copy of the weight, so the layer's is freed.
    """

    runs: Sequence[Run] = ()

    def local_pieces(self, layer: LinearBase, outputs: int) -> tuple[Sequence[Piece], Piece]:
        """The rows of each output, and the columns, that this process has."""
        if isinstance(layer, ColumnParallelLinear):
            replicas = getattr(layer, "num_kv_head_replicas", 1)
            return output_pieces(outputs, layer.tp_rank, layer.tp_size, replicas), WHOLE
        columns = Piece(layer.tp_rank, layer.tp_size) if isinstance(layer, RowParallelLinear) else WHOLE
        return (WHOLE,) * outputs, columns

    def on_cpu(self) -> bool:
        """Whether vLLM runs on a CPU."""
        return bool(current_platform.is_cpu())

    def on_gpu(self) -> bool:
        """Whether vLLM runs on a GPU of NVIDIA or AMD."""
        return bool(current_platform.is_cuda_alike())

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Check that all tensors were in the checkpoint, give dense quantised parts to vLLM, and compile the kernels.

        To load tensors again, vLLM makes the parameters again first, and calls this method again afterwards.

        Raises:
            CheckpointError: if a tensor is missing, or has NaN or infinite entries.
        """
        self.check_loaded(layer)
        self._use_kernels_of_vllm(layer)
        both = len(self.parts) == 2 and all(part.low_rank for part in self.parts) and not _serves_adapters()
        activation = fuse_gate_(layer) if both else None
        if self.on_gpu():
            # vLLM's own dummy runs have only the numbers of rows of its CUDA graphs and its largest batch.
            # A kernel with a bias is another one than without.
            model = functools.partial(self.apply, layer, bias=_passed_bias(layer))
            if activation is not None:
                model = functools.partial(self.gated, layer, activation=activation)
            warm_up(model, torch.zeros(1, self.parts[0].width, dtype=self.dtype, device=layer.Vh.device))

    def _use_kernels_of_vllm(self, layer: LinearBase) -> None:
        """Give dense quantised parts to kernels of vLLM and free their tensors in the layer."""
        values, scales = (self.views(name, getattr(layer, name).data) for name in ("weight", "weight_scales"))
        runs = make_runs(self.parts, values, scales, self.dtype)
        self.runs = renew_(self.runs, runs)
        if any(run.kernel for run in runs):
            for name in ("weight", "weight_scales"):
                parameter = getattr(layer, name)
                parameter.data = parameter.data.new_empty(0)

    def apply(self, layer: LinearBase, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., sum of N_i)."""
        if not any(run.kernel for run in self.runs):
            return super().apply(layer, x, bias)
        outputs = [self._run(layer, x, None if bias is None else bias[run.outputs], run) for run in self.runs]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)

    def _run(self, layer: LinearBase, x: Tensor, bias: Tensor | None, run: Run) -> Tensor:
        """The outputs of a run, whose bias is given."""
        if run.kernel is None:
            return self.compute(layer, x, bias, run.parts)
        y = run.kernel(x)
        return y if bias is None else y + bias

    def gated(self, layer: LinearBase, x: Tensor, activation: str) -> Tensor:
        """``act(gate(x)) * up(x)`` by a linear of two low-rank parts of one width: (..., K) → (..., N)."""
        gate, up = self.members(layer, x, _passed_bias(layer))
        return lowrank_glu(x, gate, up, activation=activation)


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
