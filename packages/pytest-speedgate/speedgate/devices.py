"""Names of devices, and what else the times of a run depend on."""

from __future__ import annotations

import platform
from pathlib import Path

from speedgate.verdicts import Where


def processor_name() -> str:
    """The processor's own name."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def where(kind: str, threads: int) -> Where:
    """Device and threads of this run.

    Raises:
        ValueError: if ``kind`` is ``"cuda"``, and there is no PyTorch or no GPU that it can use.
    """
    if kind == "cpu":
        return Where(kind, processor_name(), threads)
    try:
        import torch
    except ImportError as error:
        raise ValueError("--gate-device=cuda times by PyTorch, which is not installed; pip install torch") from error
    if not torch.cuda.is_available():
        raise ValueError("--gate-device=cuda needs a GPU that PyTorch can use, got none; use --gate-device=cpu")
    return Where(kind, torch.cuda.get_device_name(), threads)
