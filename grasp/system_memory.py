"""Memory of this machine: how much is free, and giving back what was freed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import psutil
import torch

_CGROUP = Path("/sys/fs/cgroup")


def return_freed_memory() -> None:
    """Give memory of the CPU that was freed back to the system, where the allocator keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; for a CPU, the memory that the system and the container have without swapping."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_cgroup_free()])
    return int(torch.accelerator.get_memory_info(device)[0])


def _cgroup_free() -> list[int]:
    """Free bytes of the control group of a container, its file cache included; empty if there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - used + int(statistics.get("inactive_file", 0))]
