"""What the Triton launchers share: a launch as a value, and gpu of the card."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from grasp_kernels.counters import on_device
from grasp_kernels.triton.tiles import INTERPRETED


class Launch(NamedTuple):
    """One kernel launch: what a plan consists of, to be run, compiled ahead of time, or looked at."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by parameter name, constexprs among them
    options: Mapping[str, Any]  # num_warps, num_stages, launch_pdl, ...

    def run(self) -> None:
        """Launch on the current stream of the current device."""
        self.kernel[self.grid](**self.arguments, **self.options)


def run_all(launches: Iterable[Launch], device: torch.device) -> None:
    """Launch one after the other on the device's current stream, with nothing between them."""
    with on_device(device):
        for launch in launches:
            launch.run()


class Gpu(NamedTuple):
    """What a plan depends on besides the key."""

    name: str
    processors: int  # streaming multiprocessors
    capability: int  # 10 * major + minor

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start under the end of the one before it (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def warpgroup_dots(self) -> bool:
        """Whether a large dot keeps its operands or its sum out of the registers: sm_90 and the sm_100 family."""
        return 90 <= self.capability < 120


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The card behind a device, or Triton's interpreter."""
    if device.type != "cuda" or INTERPRETED.value:
        return Gpu("interpreter", processors=8, capability=0)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor)
