"""The processes that torchrun or ``accelerate launch`` started together."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from grasp.statistics.processes import Processes


def world_size() -> int:
    """The number of processes that were started together, as the environment has it.

    Raises:
        DistributedError: if it is no number.
    """
    from grasp.errors import DistributedError

    if not (number := os.environ.get("WORLD_SIZE") or "1").isdecimal():
        raise DistributedError(f"WORLD_SIZE is {number!r}; expected the number of processes. Start them with torchrun")
    return int(number)


@contextmanager
def started_together(device: str | None, *, shard: bool = False) -> Iterator[tuple[Processes, str | None]]:
    """Join the processes started together, as the environment describes them; yield them and this one's device.

    Raises:
        ValueError: if the device is unknown, or one process is given ``shard``.
        DistributedError: if another process cannot be reached, or their number or that of this one is not known.
    """
    from grasp.errors import DistributedError
    from grasp.loading import find_device
    from grasp.statistics.processes import ALONE, joined

    if world_size() == 1:
        if shard:
            raise ValueError(
                "--shard spreads a model over several processes, but this is one; start "
                "torchrun --nproc-per-node N -m grasp compress ... --shard"
            )
        yield ALONE, device
        return
    place = find_device(device)
    if place.type != "cpu" and str(place) == place.type:  # without a number
        if (index := os.environ.get("LOCAL_RANK")) is None:
            raise DistributedError("LOCAL_RANK is not set; start the processes with torchrun, or give --device cuda:N")
        place = find_device(f"{place.type}:{index}")
    with joined(place, sharded=shard) as processes:
        yield processes, str(place)
