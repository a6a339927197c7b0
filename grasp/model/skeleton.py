"""A model without data: its modules and the shapes of its parameters, made from a configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def skeleton(
    config: PreTrainedConfig,
    build: Callable[[PreTrainedConfig], PreTrainedModel],
    device: torch.device | str = "meta",
) -> PreTrainedModel:
    """The dense model that a configuration describes, with all linears dense if the configuration has ranks.

    Args:
        config: not changed.
        build: makes the model: its class, or ``AutoModelForCausalLM.from_config``.
        device: of the parameters; another than ``"meta"`` allocates memory, except under a ``FakeTensorMode``.
    """
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    with torch.device(device):
        return build(config)
