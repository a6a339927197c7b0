"""The size of a model: parameters and bytes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Size:
    """Logical parameters and bytes, a tied weight counted once."""

    parameters: int
    bytes: int
    decoder_parameters: int  # those inside the decoder layers


def model_size(model: nn.Module, layers: nn.ModuleList) -> Size:
    """Parameters and bytes of a model, each distinct parameter counted once, also where it is offloaded."""
    tied = getattr(model, "all_tied_weights_keys", {})  # offloading makes two parameters without data of one
    parameters = [
        p
        for name, p in model.named_parameters()  # distinct ones: torch leaves out repeats
        if not (p.is_meta and name in tied)
    ]
    return Size(
        parameters=sum(p.numel() for p in parameters),
        bytes=sum(p.numel() * p.element_size() for p in parameters),
        decoder_parameters=sum(p.numel() for p in layers.parameters()),
    )
