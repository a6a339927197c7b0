"""Quantised embeddings and output layers of vLLM, which may share their tensors."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod, VocabParallelEmbedding

from grasp.model.checkpoint_format import METHOD
from grasp.serving.embedding_method import QuantizedEmbeddingMethod


class GraspEmbeddingMethod(QuantizedEmbeddingMethod, QuantizeMethodBase):
    """An embedding or output layer of vLLM with quantised rows."""


@functools.cache
def watch_embeddings() -> None:
    """From now on, quantise the embeddings that vLLM builds without asking its plugins, or without their path.

    They are known by the name of the attribute that they become. Half of vLLM's architectures do not ask.
    """

    def quantize(_: nn.Module, attribute: str, layer: nn.Module | None) -> None:
        if not isinstance(layer, VocabParallelEmbedding) or type(layer.quant_method) is not UnquantizedEmbeddingMethod:
            return
        config = get_current_vllm_config_or_none()
        own: Any = config and config.quant_config
        stored = own.quantized if own is not None and own.get_name() == METHOD else {}
        paths = [path for path in stored if path.rpartition(".")[2] == attribute]
        if paths:
            layer.quant_method = GraspEmbeddingMethod(paths[0], stored[paths[0]])
            layer.use_fused_embedding = False  # a kernel that reads floating rows
            sizes = (layer.embedding_dim, layer.output_partition_sizes, layer.embedding_dim, layer.output_size)
            layer.quant_method.create_weights(
                layer, *sizes, params_dtype=layer.params_dtype, weight_loader=layer.weight_loader
            )

    register_module_module_registration_hook(quantize)
