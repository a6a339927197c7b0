"""Sums over calibration batches that can be stored half done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from grasp.model.targets import Target


class Sum(Protocol):
    """A statistic that grows call by call."""

    tensor: Tensor
    calls: int


class PartialSums:
    """Stores nothing, so every sweep starts at its first batch. ``grasp.checkpoint.run_state`` stores the sums."""

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to the stored ones; the number of its batches that they hold."""
        return 0

    def keep_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Store the sums of a sweep now and then, and at its end, when they hold ``done`` of ``batches`` batches."""
