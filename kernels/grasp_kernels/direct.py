"""The direct path: compiled ops that run a small call at once, without PyTorch's dispatcher.

The table decides which calls take it. An op takes the arguments of the public op, in order, and returns ``None``, and
does nothing, for any other call.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .cpu import open_direct_path
from .dispatch import CPU_ROWS, backend_missing
from .recording import recorders

PLAIN_TYPES = (Tensor, nn.Parameter)
# Each returns a true value while a mode, a transform or a tracer is active, which must see the registered op.
WATCHERS: tuple[Callable[[], object], ...] = (
    torch._C._len_torch_function_stack,
    torch._C._len_torch_dispatch_stack,
    torch._C._functorch.peek_interpreter_stack,
    torch._C._get_tracing_state,
)
# Autocast casts, and calls are recorded, in what this path passes by.
DIRECT_WATCHERS = (*WATCHERS, torch._C._is_any_autocast_enabled, recorders.__len__)


def _decline(*_: object) -> None:
    """Stands for the direct path of an op that has none."""


_ops = open_direct_path(PLAIN_TYPES, DIRECT_WATCHERS, CPU_ROWS) if backend_missing("cpu") is None else {}
linear: Callable[..., Tensor | None] = _ops.get("lowrank_linear", _decline)
grouped: Callable[..., tuple[Tensor, ...] | None] = _ops.get("lowrank_linear_grouped", _decline)
