"""Shared by the Triton launchers: a launch as a value, and the properties of the GPU."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch

from ..counters import on_device
from .tiles import INTERPRETED


class Launch(NamedTuple):
    """One kernel launch of a plan. It can be run, compiled ahead of time, or inspected."""

    kernel: Any  # the triton.jit function
    grid: tuple[int, ...]
    arguments: Mapping[str, Any]  # by parameter name, constexprs included
    options: Mapping[str, Any]  # num_warps, num_stages, launch_pdl, ...

    def run(self) -> Any:
        """Launch on the current stream of the current device. Returns the binary, ``None`` from the interpreter."""
        return self.kernel[self.grid](**self.arguments, **self.options)


def run_all(launches: Iterable[Launch], device: torch.device) -> list[Any]:
    """Launch all of them in order on the device's current stream, with nothing in between; returns the binaries."""
    with on_device(device):
        return [launch.run() for launch in launches]


class Gpu(NamedTuple):
    """The properties of a GPU that a plan depends on."""

    name: str
    processors: int  # streaming multiprocessors
    capability: int  # 10 * major + minor

    @property
    def dependent_launch(self) -> bool:
        """Whether a kernel may start before the previous one ends (programmatic dependent launch)."""
        return self.capability >= 90

    @property
    def warpgroup_dots(self) -> bool:
        """Whether large dots hold operands or sums outside the registers: sm_90 and the sm_100 family."""
        return 90 <= self.capability < 120


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a device, or a description of Triton's interpreter."""
    if device.type != "cuda" or INTERPRETED.value:
        return Gpu("interpreter", processors=8, capability=0)
    properties = torch.cuda.get_device_properties(device)
    return Gpu(properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor)
