"""Quantised embeddings and output layers of a serving stack, which may share their tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from grasp.errors import CheckpointError
from grasp.method.storage import Storage
from grasp.model.quantized_linear import VALUES, quantized_product, quantized_rows
from grasp.serving.parts import Spec, check_tensor


class QuantizedEmbeddingMethod:
    """An embedding or output layer with int8 or int4 rows, ``weight``, and their scales, ``weight_scales``.

    The stack shares out the rows between processes. Its own loader of these layers does that for both tensors.
    """

    def __init__(self, name: str, storage: Storage) -> None:
        self.name, self.storage = name, storage

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        *,
        weight_loader: Callable[..., None],
        **extra_weight_attrs: Any,
    ) -> None:
        """Create the parameters of the layer; its constructor calls this once."""
        rows, values = sum(output_partition_sizes), VALUES[self.storage.dtype]
        weight = torch.zeros(rows, self.storage.columns(input_size), dtype=values)
        scales = torch.full((rows, self.storage.scales(input_size)), torch.nan, dtype=params_dtype)  # NaN: not loaded
        for name, tensor, stored in (("weight", weight, values), ("weight_scales", scales, None)):
            spec = Spec((layer.org_vocab_size, tensor.shape[1]), stored)
            parameter: Any = nn.Parameter(tensor, requires_grad=False)
            parameter.weight_loader = self._loader(f"{self.name}.{name}", spec, weight_loader)
            parameter.output_dim = 0
            layer.register_parameter(name, parameter)
        layer.register_buffer("order", torch.arange(rows, dtype=torch.int32), persistent=False)
        layer.register_buffer("others", torch.empty(0, rows, dtype=params_dtype), persistent=False)

    def _loader(self, path: str, spec: Spec, load_shard: Callable[..., None]) -> Callable[..., None]:
        """The loader of a parameter. It is a function because vLLM's reloading needs ``__name__``."""

        def load(param: nn.Parameter, loaded_weight: Tensor) -> None:
            check_tensor(path, loaded_weight, spec)
            load_shard(param, loaded_weight)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Check that the tensors were in the checkpoint.

        Raises:
            CheckpointError: if a scale is missing, NaN or infinite.
        """
        if not torch.isfinite(layer.weight_scales).all():
            raise CheckpointError(
                f"{self.name}.weight_scales is not in the checkpoint, or has NaN or infinite entries; expected finite "
                "ones. Save or copy the checkpoint again."
            )

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """(...) int64 → (..., K) in the dtype of the scales."""
        return quantized_rows(input_, layer.weight, layer.weight_scales, layer.embedding_dim)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., K) → (..., V)."""
        return quantized_product(x, layer.weight, layer.weight_scales, bias, layer.others, layer.order)

    def tie_weights(self, layer: Any, embed_tokens: Any) -> nn.Module:
        """Share the tensors of the embedding with an output layer."""
        layer.weight, layer.weight_scales = embed_tokens.weight, embed_tokens.weight_scales
        tied: nn.Module = layer
        return tied
