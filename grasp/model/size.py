"""The size of a model: parameters and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Size:
    """Logical parameters and bytes; a tied weight counts once."""

    parameters: int
    bytes: int
    decoder_parameters: int  # those inside the decoder layers


def model_size(model: nn.Module, layers: nn.ModuleList) -> Size:
    """Count the parameters and bytes of a model; a shared parameter counts once, also if it is offloaded.

    Bytes include the ``order`` of pivoted layers, which are no parameters.

    Args:
        model: dense or compressed.
        layers: its decoder layers.
    """
    tied = getattr(model, "all_tied_weights_keys", {})  # offloading splits a tied parameter into two on the meta device
    parameters = [
        p
        for name, p in model.named_parameters()  # torch omits duplicates
        if not (p.is_meta and name in tied)
    ]
    orders = [buffer for name, buffer in model.named_buffers() if name.rpartition(".")[2] == "order"]
    return Size(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in (*parameters, *orders)),
        decoder_parameters=sum(p.numel() for p in layers.parameters()),
    )
