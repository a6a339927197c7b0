"""Tasks that fail as kernels on a GPU can fail, for the tests of ``benchmarks.gpu.check_runner``."""

from __future__ import annotations

import os
import resource
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks.gpu.check_runner import Emit


class AcceleratorError(RuntimeError):
    """Raised by PyTorch for a CUDA error, after which the process cannot use the GPU."""


class OutOfMemoryError(RuntimeError):
    """Raised by PyTorch."""


def _raise(error: Exception) -> None:
    raise error


def _eat_memory() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
    held = []
    while True:
        held.append(bytearray(1 << 26))


ILLEGAL_ACCESS = "CUDA error: an illegal memory access was encountered\nCompile with `TORCH_USE_CUDA_DSA`"
PLANTS: dict[str, Callable[[], object]] = {
    "good": lambda: None,
    "printing": partial(print, "not a result", flush=True),
    "illegal access": partial(_raise, AcceleratorError(ILLEGAL_ACCESS)),
    "out of memory": partial(_raise, OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
    "no memory": _eat_memory,
    "hang": partial(time.sleep, 1000),
    "exit": partial(os._exit, 3),
    "segmentation fault": lambda: os.kill(os.getpid(), signal.SIGSEGV),
}


def task(emit: Emit, *, providers: Sequence[str], without: Sequence[str] = ()) -> None:
    """Run the named plants in order, one result for each that returns."""
    for name in providers:
        if name not in without:
            emit({"kind": "step", "provider": name})
            PLANTS[name]()
            emit({"kind": "result", "provider": name})


def slow(emit: Emit, *, folder: str, without: Sequence[str] = ()) -> None:
    """Take long as long as there is a file ``wait``."""
    emit({"kind": "result", "provider": "slow"})
    time.sleep(1000 * (Path(folder) / "wait").exists())


def card(emit: Emit, *, card: dict[str, object], without: Sequence[str] = ()) -> None:
    """Speeds that were not measured."""
    emit({"kind": "card", "card": card, "conditions": {}})
