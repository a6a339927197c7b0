"""Clocks, power and throttling of a GPU, from ``nvidia-smi``, which asks NVML."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from statistics import median
from typing import Any, NamedTuple

# Bits of NVML's mask of clock event reasons.
REASONS = {
    0x1: "idle",
    0x2: "application clocks",
    0x4: "power cap",
    0x8: "hardware slowdown",
    0x10: "sync boost",
    0x20: "thermal, software",
    0x40: "thermal, hardware",
    0x80: "power brake",
    0x100: "display clocks",
}
QUERY = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
REASONS_QUERIES = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")  # the second of drivers before 535


class GpuState(NamedTuple):
    """One reading."""

    sm_mhz: float
    memory_mhz: float
    watts: float
    celsius: float
    reasons: int  # bits of REASONS


def read_state() -> GpuState | None:
    """The state of the first visible GPU; ``None`` if ``nvidia-smi`` does not work."""
    gpu = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0] or "0"
    for reasons in REASONS_QUERIES:
        command = ["nvidia-smi", "-i", gpu, f"--query-gpu={QUERY},{reasons}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        if done.returncode == 0:
            return parse(done.stdout)
    return None


def summary(states: Sequence[GpuState]) -> dict[str, Any] | None:
    """Clocks (least, median, most), most power and heat, and all throttle reasons; ``None`` without readings."""
    if not states:
        return None
    clocks = [state.sm_mhz for state in states]
    return {
        "sm_mhz": [min(clocks), median(clocks), max(clocks)],
        "memory_mhz": median(state.memory_mhz for state in states),
        "watts": max(state.watts for state in states),
        "celsius": max(state.celsius for state in states),
        "throttle_reasons": [name for bit, name in REASONS.items() if any(state.reasons & bit for state in states)],
        "readings": len(states),
    }


def parse(text: str) -> GpuState | None:
    """A line of ``nvidia-smi`` in the order of ``QUERY``, reasons last; ``None`` if a value is not available."""
    try:
        sm, memory, watts, celsius, reasons = (part.strip() for part in text.strip().split(","))
        return GpuState(float(sm), float(memory), float(watts), float(celsius), int(reasons, 16))
    except ValueError:
        return None
