"""This machine: versions, processors, which backends of the dispatch table can run, and memory."""

from __future__ import annotations

import ctypes
import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

import psutil
import torch

from grasp.version import __version__
from grasp_kernels.dispatch import BACKENDS, backend_missing

_CGROUP = Path("/sys/fs/cgroup")
_OWN_CGROUP = Path("/proc/self/cgroup")
_NO_MEMORY = ("can't allocate memory", "not enough memory")  # messages of PyTorch's CPU allocators
_PACKAGES = ("triton", "transformers", "accelerate", "safetensors", "huggingface_hub", "numpy")


def environment() -> dict[str, Any]:
    """Return versions, CPU, GPUs, each backend's availability, and whether transformers loads grasp checkpoints.

    Example:
        >>> environment()["backends"]["reference"]
        'available'
    """
    return {
        "versions": {"grasp": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
        | {name: installed_version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpu": {
            "logical_cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
        },
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())],
        "backends": {row.name: backend_missing(row.name) or "available" for row in BACKENDS},
        "transformers_reload": _reload_status(),
    }


def installed_version(package: str) -> str | None:
    """The version of a package; ``None`` if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


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


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
    }


def _reload_status() -> str:
    """Return ``"available"`` if a process that does not import grasp can load a grasp checkpoint, else the reason."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") == "0":
        return "off: TORCH_DEVICE_BACKEND_AUTOLOAD=0; `import grasp` before loading"
    if not any(point.name == "grasp" for point in entry_points(group="torch.backends")):
        return "off: grasp is importable but not installed; `import grasp` before loading"
    return "available"


def _cgroup_free() -> list[int]:
    """Free bytes of the control groups (version 2) around this process that have a limit, their file cache included."""
    free: list[int] = []
    with suppress(OSError):
        own = "".join(line[3:] for line in _OWN_CGROUP.read_text().splitlines() if line.startswith("0::"))
        inner = _CGROUP / own.strip("/")
        for group in (inner, *inner.parents[: len(inner.parents) - len(_CGROUP.parents)]):
            with suppress(OSError):  # the root of the machine has no such files, nor has a group outside of a container
                limit = (group / "memory.max").read_text().strip()
                used = int((group / "memory.current").read_text())
                statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
                if limit != "max":
                    free.append(int(limit) - used + int(statistics.get("inactive_file", 0)))
    return free


def out_of_memory(error: BaseException) -> bool:
    """Whether an error reports too little memory of a device or of the machine."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        isinstance(error, RuntimeError) and any(message in str(error) for message in _NO_MEMORY)
    )
