"""The weight of a dense linear as (N, K), also if it is transposed, sharded or offloaded."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import Conv1D

from grasp.model.offload import fetched

DenseLinear = nn.Linear | Conv1D


def dense_weight(linear: DenseLinear) -> Tensor:
    """The weight as (N, K), out_features first; GPT-2's ``Conv1D`` stores the transpose.

    A sharded weight is gathered, an offloaded one fetched.
    """
    weight = gathered(fetched(linear, "weight"))
    return weight.mT if isinstance(linear, Conv1D) else weight


def dense_shape(linear: DenseLinear) -> tuple[int, int]:
    """(N, K) of the weight; the weight is not read."""
    n, k = linear.weight.shape
    return (k, n) if isinstance(linear, Conv1D) else (n, k)


def gathered(tensor: Tensor) -> Tensor:
    """The full tensor if FSDP has sharded it, in which case all processes must call this; otherwise the same tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
