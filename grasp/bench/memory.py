"""Peak memory of a call, and calls for which there is too little.

The peak is PyTorch's count on a GPU, Linux's count of this process on a CPU, and unknown elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch

from grasp.environment import out_of_memory, return_freed_memory

Item = TypeVar("Item")

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def records_within_memory(records: Iterable[Item], too_large: Item) -> Iterator[Item]:
    """The records of a measurement; ends with ``too_large`` where the device has too little memory to go on."""
    try:
        yield from records
        return
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
    yield too_large  # here the error, and the tensors of its frames, are gone


@contextmanager
def leaving_out(
    left_out: dict[str, str], name: str, too_large: str, others: tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Note why a model is left out: the message of an expected exception, or ``too_large`` where memory ends."""
    try:
        yield
    except others as error:
        left_out[name] = str(error)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        left_out[name] = too_large


def peak_bytes_above_now(call: Callable[[], object], device: torch.device | None = None) -> int | None:
    """Most bytes held during a call, minus the bytes held before; ``None`` if unknown.

    On a CUDA ``device`` the bytes of PyTorch's tensors; else the bytes of this process. There, freed memory goes back
    to the system first, so that the call's reuse of it is counted.
    """
    if device is not None and device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - held
    before = reset_peak_bytes()
    call()
    return None if before is None else peak_bytes() - before


def reset_peak_bytes() -> int | None:
    """Let ``peak_bytes`` count from now on; the bytes that this process holds, ``None`` if unknown.

    Freed memory goes back to the system first.
    """
    if not _CLEAR.exists():
        return None
    return_freed_memory()
    _CLEAR.write_text("5")  # the peak is reset, see proc_pid_clear_refs(5)
    return _status("VmRSS")


def peak_bytes() -> int:
    """Most bytes that this process has held since ``reset_peak_bytes``, which must know them."""
    return _status("VmHWM")


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}; expected a file of the Linux kernel")
