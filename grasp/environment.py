"""Describes this machine: versions, processors, and which backends of the dispatch table can run."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from grasp.version import __version__
from grasp_kernels.dispatch import BACKENDS, backend_missing

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
        return "off: TORCH_DEVICE_BACKEND_AUTOLOAD=0; `import grasp.model.hf_quantizer` before loading"
    if not any(point.name == "grasp" for point in entry_points(group="torch.backends")):
        return "off: grasp is importable but not installed; `import grasp.model.hf_quantizer` before loading"
    return "available"
