"""The sums from which a linear map in the place of decoder layers is fitted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from grasp.model.hooks import hooked
from grasp.model.running import hidden_output
from grasp.model.targets import decoder
from grasp.statistics.sweep import Prefix, Rows, alone, run_layers
from grasp_kernels.reference import accumulation_dtype


@torch.no_grad()
def map_sums(prefix: Prefix, layers: range, added: nn.Module) -> tuple[Tensor, Tensor]:
    """``Σ y yᵀ`` and ``Σ z yᵀ`` over the tokens, without padding; the first layer returns r + y, the last r + z.

    Args:
        prefix: hidden states at the first of the layers.
        layers: contiguous; a map of y is to replace all but the first.
        added: the module of the first layer whose output is y.

    Returns:
        Two tensors, (H, H) in fp32 (fp64 for fp64), on the device of y. Hidden states of one batch are in memory.
    """
    first, outputs = decoder(prefix.model).layers[layers.start], dict[nn.Module, Tensor]()
    sums: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        outputs[module] = hidden_output(output)

    with alone(prefix, layers), hooked(first, added, after=keep):
        for index, batch in enumerate(prefix.batches):
            rows = Rows(batch)
            end = rows.of(run_layers(prefix, layers, index, prefix.hidden[layers.start][index]))
            y, start = (rows.of(outputs[module]) for module in (added, first))
            dtype = accumulation_dtype(y.dtype)
            y, start, end = (states.to(y.device, dtype) for states in (y, start, end))
            sums = sums or [y.new_zeros(y.shape[1], y.shape[1]) for _ in range(2)]
            sums[0].addmm_(y.mT, y)
            sums[1].addmm_((end - start + y).mT, y)
    gram, cross = sums
    return gram, cross
