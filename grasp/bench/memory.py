"""Memory of this process as the kernel counts it. Linux only; elsewhere nothing is known."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak_bytes_above_now(call: Callable[[], object]) -> int | None:
    """The most bytes that this process held during a call, less what it holds before; ``None`` where unknown.

    Memory that was freed before is given back first, so that the call does not get it for nothing.
    """
    if not _CLEAR.exists():
        return None
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc
    if trim is not None:
        trim(0)
    _CLEAR.write_text("5")  # the peak is reset, see proc_pid_clear_refs(5)
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in _STATUS.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{_STATUS} has no {field}; expected a Linux kernel's")
