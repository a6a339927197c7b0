"""Distances between hidden states, and the layers they make redundant."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def cosine_distance(before: Tensor, after: Tensor) -> Tensor:
    """``1 − cos`` between hidden states, token by token: (..., H) twice → (...), in fp32 (fp64 for fp64)."""
    dtype = torch.promote_types(before.dtype, torch.float32)
    return 1 - torch.nn.functional.cosine_similarity(before.to(after.device, dtype), after.to(dtype), dim=-1)


def angular_distance(before: Tensor, after: Tensor) -> Tensor:
    """``arccos(cos) / π`` between hidden states: (..., H) twice → (...), in [0, 1]. Source: arXiv 2403.17887."""
    return (1 - cosine_distance(before, after)).clamp(-1, 1).arccos() / math.pi


def least_changing_run(runs: Sequence[Sequence[float]], count: int) -> tuple[int, ...]:
    """The ``count`` consecutive layers that change the hidden states least together; of equals, the shallowest.

    Args:
        runs: as in ``Redundancy``.
        count: how many layers.

    Raises:
        ValueError: if the model has fewer layers.
    """
    depth = len(runs) - 1
    if count > depth:
        raise ValueError(f"the model has {depth} decoder layers, got num_layers={count}")
    first = min(range(depth - count + 1), key=lambda layer: runs[layer][layer + count])
    return tuple(range(first, first + count))
