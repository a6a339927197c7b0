"""Sums over calibration batches that can be stored before a sweep ends."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor

from grasp.model.targets import Target


class Sum(Protocol):
    """A statistic that grows with every call of its linear."""

    tensor: Tensor
    calls: int


class PartialSums:
    """Stores nothing, so every sweep starts at its first batch. ``grasp.checkpoint.run_state`` stores the sums."""

    def restore_sums(self, sums: Mapping[Target, Sum]) -> int:
        """Set the sums of a sweep to the stored ones; the number of batches that they hold."""
        return 0

    def store_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Store the sums of a sweep, which hold ``done`` of ``batches`` batches: twice a minute, and at its end."""
