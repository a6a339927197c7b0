"""Costs of launches on a GPU: the gap between two kernels, the ramp of a full grid, a barrier across the grid."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from grasp.bench.timing import interleave
from grasp_kernels.triton.launch import gpu_of
from grasp_kernels.triton.tiles import arrive, wait
from speedgate.timing import Rotation, batch

BLOCK = 1024  # fp32 values that each program of the ramp reads
CROSSINGS = 32  # barriers in one launch
OPTIONS = {"enable_fp_fusion": True}  # Triton's default is about to change


@dataclass(frozen=True)
class LaunchCosts:
    """Medians in µs of launches in one CUDA graph; on a CPU they are costs of the interpreter, which mean nothing."""

    gap_us: float  # between two empty kernels of one program; the second waits for the first
    dependent_gap_us: float | None  # gap with programmatic dependent launch; None before sm_90
    ramp_us: float  # time above the gap of a grid with one program per processor that reads ``BLOCK`` values
    programs: int  # of this grid


@triton.jit
def _empty_kernel():
    pass


@triton.jit
def _dependent_kernel():
    gdc_launch_dependents()
    gdc_wait()


@triton.jit
def _reading_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    pid = tl.program_id(0)
    values = tl.load(x_ptr + pid * BLOCK + tl.arange(0, BLOCK))
    tl.store(y_ptr + pid, tl.sum(values, axis=0))


@triton.jit
def _barrier_kernel(counter_ptr, CROSSINGS: tl.constexpr):
    for _ in range(CROSSINGS):
        ticket = arrive(counter_ptr)
        wait(counter_ptr, ticket)


def measure_launches(device: torch.device, *, calls: int = 200, repetitions: int = 20) -> LaunchCosts:
    """Measure the launches without a barrier, in turns, on a GPU or on a CPU with Triton's interpreter.

    One graph has ``calls`` launches and is replayed ``repetitions`` times.
    """
    programs = _programs(device)
    x = torch.randn(programs, BLOCK, device=device)
    y = x.new_empty(programs)
    launches: dict[str, Callable[[None], object]] = {
        "empty": lambda _: _empty_kernel[(1,)](**OPTIONS),
        "reading": lambda _: _reading_kernel[(programs,)](x, y, BLOCK=BLOCK, **OPTIONS),
    }
    if gpu_of(device).dependent_launch:
        launches["dependent"] = lambda _: _dependent_kernel[(1,)](launch_pdl=True, **OPTIONS)
    times = _medians(device, launches, calls, repetitions)
    gap = times["empty"]
    return LaunchCosts(gap, times.get("dependent"), ramp_us=times["reading"] - gap, programs=programs)


def measure_barrier(device: torch.device, *, calls: int = 200, repetitions: int = 20) -> float:
    """µs of one barrier of a grid with one program per processor: what more crossings take longer, of each.

    Arguments as for ``measure_launches``. A barrier that is wrong never ends.
    """
    programs = _programs(device)
    counter = torch.zeros(1, dtype=torch.int32, device=device)

    def crossing(times: int) -> Callable[[None], object]:
        return lambda _: _barrier_kernel[(programs,)](counter, CROSSINGS=times, launch_cooperative_grid=True, **OPTIONS)

    times = _medians(device, {"one": crossing(1), "more": crossing(1 + CROSSINGS)}, calls, repetitions)
    return (times["more"] - times["one"]) / CROSSINGS


def _programs(device: torch.device) -> int:
    return gpu_of(device).processors if device.type == "cuda" else 1


def _medians(
    device: torch.device, launches: Mapping[str, Callable[[None], object]], calls: int, repetitions: int
) -> dict[str, float]:
    """Median µs of each launch."""
    batches = {name: batch(device.type, launch, Rotation([None]), calls) for name, launch in launches.items()}
    return {name: sample.median * 1e6 for name, sample in interleave(batches, repetitions).items()}
