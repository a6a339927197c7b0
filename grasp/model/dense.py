"""The weight of a dense linear, wherever it is stored and whichever way round."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from grasp.method.svd import SVD
from grasp.model.offload import fetched

DenseLinear = nn.Linear | Conv1D


def dense_weight(linear: DenseLinear) -> Tensor:
    """The weight as (N, K), out_features first: GPT-2's ``Conv1D`` stores its transpose.

    If it is sharded, it is gathered; if offloaded, fetched.
    """
    weight = gathered(fetched(linear, "weight"))
    return weight.mT if isinstance(linear, Conv1D) else weight


def dense_shape(linear: DenseLinear) -> tuple[int, int]:
    """(N, K) of a weight, wherever it is."""
    n, k = linear.weight.shape
    return (k, n) if isinstance(linear, Conv1D) else (n, k)


def gathered(tensor: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has spread over processes, all of which must ask; any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@contextmanager
def temporary_low_rank(factors: Iterable[tuple[DenseLinear, SVD]]) -> Iterator[None]:
    """Let dense linears, their weights in memory, compute what low-rank ones would; these are put back bit for bit."""
    saved: dict[Tensor, Tensor] = {}
    try:
        for linear, svd in factors:
            weight = linear.weight
            U, S, Vh = (each.to(weight.device) for each in svd)
            product = (U * S) @ Vh
            saved[weight] = weight.data
            weight.data = (product.mT if isinstance(linear, Conv1D) else product).to(weight.data).contiguous()
        yield
    finally:
        for weight, data in saved.items():
            weight.data = data
