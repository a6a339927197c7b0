"""CUDA: the compiled decode kernels of csrc/cuda, ``((x @ Vh.mT) * s) @ U.mT + bias`` for up to 16 rows.

``pair`` is two launches, shrink and expand. ``dependent`` is the same, but the second starts before the first ends.
``cooperative`` is one launch with a grid barrier between the two phases.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .counters import counters, on_device
from .extension import DTYPE_CODES, in_place, pointers
from .reference import Factors

PATH_CODES = {"auto": 0, "pair": 1, "dependent": 2, "cooperative": 3}  # grasp_cuda_path in csrc/lowrank.h
_RANK = 9  # the index of R in the tuple of `pointers`


def run(
    x: Tensor,
    factors: Sequence[Factors],
    outputs: Sequence[Tensor] | None = None,
    *,
    path: str = "auto",
    splits: int = 0,
) -> list[Tensor]:
    """Several low-rank linears of one input; a pair of launches runs up to 8 that are stored alike.

    Args:
        x: (M, K), M at most 16; fp32, fp16 or bf16 on a CUDA device.
        factors: on the device of x and in its dtype; s and scales may be fp32, U and Vh int8 or int4, which
            neither fp32 nor ``"cooperative"`` takes. Tensors that the kernels cannot read in place are copied first.
        outputs: filled if given, (M, N_i) with unit inner strides.
        path: one of ``PATH_CODES``; ``"auto"`` is the pair, dependent if the GPU can.
        splits: of K, one partial sum of h each; 0 makes as many as the GPU has room for.

    Raises:
        ValueError: if the launcher refuses the arguments.
        RuntimeError: if the GPU cannot run the path, or a CUDA call fails; the message has CUDA's reason.
    """
    rows, K = x.shape
    outputs = [x.new_empty(rows, group.out_features) for group in factors] if outputs is None else list(outputs)
    if rows == 0:
        return outputs
    x, stride = in_place(x)
    pointed = [pointers(group, output, K) for group, output in zip(factors, outputs, strict=True)]
    groups = tuple([group for group, _ in pointed])  # `pointed` keeps the copies alive that they point to
    size = _workspace_bytes(rows, tuple([group[_RANK] for group in groups]))
    with on_device(x.device):
        _load_kernels(x.device)
        stream, workspace = _workspace(x.device, size)
        barrier = counters(x.device, 1).data_ptr() if path == "cooperative" else 0
        where = (stream, workspace.data_ptr(), workspace.numel(), barrier)
        _module().run(x.data_ptr(), stride, rows, K, DTYPE_CODES[x.dtype], groups, *where, PATH_CODES[path], splits)
    return outputs


@functools.cache
def _module() -> Any:
    return importlib.import_module("._cuda", __package__)


@functools.cache
def _load_kernels(device: torch.device) -> None:
    """Load the kernels: otherwise a capture could need one that has never run."""
    _module().load()


@functools.lru_cache(maxsize=1024)
def _workspace_bytes(rows: int, ranks: tuple[int, ...]) -> int:
    return _module().workspace_bytes(rows, ranks)


def _workspace(device: torch.device, size: int) -> tuple[int, Tensor]:
    """The current stream, and memory for h. The allocator may reuse it at once, for later work on this stream."""
    stream: int = torch._C._cuda_getCurrentRawStream(device.index)
    return stream, torch.empty(size, dtype=torch.uint8, device=device)
