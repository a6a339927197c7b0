"""Compiles the kernels of a model before it serves, so that no request waits for a compiler."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from . import registered  # noqa: F401  makes the ops
from ._ops import ops

ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)  # one above PAIR_ROWS in launch_configs.py
_OPS = [
    getattr(ops, op).default
    for op in ("lowrank_linear", "lowrank_linear_grouped", "lowrank_linear_merged", "lowrank_glu")
]


class _Recorder(TorchDispatchMode):
    """Records the low-rank calls that are made while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Tensor, list[Any]]] = []  # op, (0, K) in the place of x, and the other arguments

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _OPS:
            x, *rest = args
            self.calls.append((func, x.new_empty(0, x.shape[-1]), rest))
        return func(*args, **(kwargs or {}))


@torch.inference_mode()
def warm_up(model: Callable[..., object], *inputs: object, rows: Iterable[int] = ROWS) -> None:
    """Run a model once, then each of its low-rank calls with other numbers of rows, so that every kernel is compiled.

    Without it the first request of each size waits for Triton's compiler. Kernels are compiled for powers of two. Above
    512 rows matrix products run instead, and one kernel after them for pivoted factors in 16 bits. So by default calls
    with any number of rows are ready, and a CUDA graph can be captured. For a CPU nothing is compiled: the model only
    runs.

    Args:
        model: a module, or any function that uses the ops.
        inputs: its arguments, such as 32 tokens. With more than 16 rows a call can take another op than with fewer.
        rows: numbers of rows (tokens in one call) to prepare.

    Raises:
        ValueError: if ``rows`` has a number below 1.

    Example:
        >>> import torch
        >>> from grasp_kernels import lowrank_linear, warm_up
        >>> U, Vh = torch.randn(32, 8), torch.randn(8, 64)
        >>> warm_up(lambda x: lowrank_linear(x, U, None, Vh), torch.randn(2, 64))
    """
    rows = sorted(rows)
    if rows and rows[0] < 1:
        raise ValueError(f"rows must be at least 1, got {rows[0]}")
    with _Recorder() as recorder:
        model(*inputs)
    for op, empty, arguments in recorder.calls:
        for count in rows if not empty.is_cpu or arguments[-1] != "auto" else ():
            op(empty.new_zeros(count, empty.shape[1]), *arguments)
