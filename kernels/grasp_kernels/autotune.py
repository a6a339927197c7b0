"""Measure launch configurations on this machine's GPU and save the fastest; ``grasp bench tune`` runs this."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from grasp_kernels.launch_configs import CONFIGS, PATHS, Config, LaunchKey, on_path, rule_of_thumb, save, serves
from grasp_kernels.packing import pack_factors
from grasp_kernels.reference import Factors
from grasp_kernels.triton.launch import gpu_of
from grasp_kernels.triton.lowrank_glu import run as run_glu
from grasp_kernels.triton.lowrank_linear import run as run_linear

COLD_BYTES = 150 << 20  # of distinct factors in one measurement: more than the L2 cache of any GPU
MIN_CALLS = 20  # in one measurement
WARM_UP_MS, REPLAYS = 200, 25
GAIN = 0.99  # a change must take less than this fraction of the best time, so that noise does not decide
AGREEMENT = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}  # norm-wise, with matrix products

# Candidate values, one field after the other; each field starts from the best configuration so far.
STEPS: dict[str, dict[str, tuple[Any, ...]]] = {
    "pair": {
        "splits": (1, 2, 4, 8, 16),
        "shrink_block_r": (16, 32, 64),
        "shrink_block_k": (64, 128, 256, 512),
        "reduce": (False, True),
        "shrink_warps": (2, 4, 8),
        "expand_block_n": (16, 32, 64, 128),
        "expand_block_r": (32, 64, 128, 256, 512),
        "expand_warps": (2, 4, 8),
        "block_m": (16, 32, 64, 128),
        "stages": (2, 3, 4),
    },
    "fused": {
        "splits": (1, 2, 4, 8, 16),
        "shrink_block_r": (16, 32, 64),
        "shrink_block_k": (64, 128, 256, 512),
        "reduce": (False, True),
        "expand_block_n": (16, 32, 64, 128),
        "expand_warps": (4, 8),
        "stages": (2, 3, 4),
    },
    "gemms": {
        "expand_block_n": (64, 128, 256),
        "expand_block_r": (32, 64, 128),
        "block_m": (64, 128),
        "expand_warps": (4, 8),
        "stages": (2, 3, 4),
    },
}
PATHS_OF = {"lowrank_linear": PATHS, "lowrank_glu": ("pair", "gemms")}

Measure = Callable[[Sequence[Callable[[], Any]]], float]


class Workload(NamedTuple):
    """A call to tune for: M rows of K features, and (N, R) of each member of the group."""

    rows: int
    in_features: int
    members: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16


def measure_graph(calls: Sequence[Callable[[], Any]]) -> float:
    """Median µs per call in one CUDA graph of all calls; their factors together should exceed the L2 cache."""
    for call in calls[:2]:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()

    def replay() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)  # ms

    warm = 0.0
    while warm < WARM_UP_MS:
        warm += replay()
    return statistics.median(replay() for _ in range(REPLAYS)) * 1000 / len(calls)


def tune(
    kernel: str,
    workloads: Sequence[Workload],
    *,
    device: torch.device | str = "cuda",
    directory: Path = CONFIGS,
    measure: Measure = measure_graph,
) -> Path:
    """Find the fastest configuration for each workload, and write the GPU's file in place of an earlier one.

    Args:
        kernel: ``"lowrank_linear"``, also for grouped calls, or ``"lowrank_glu"``, whose workloads have two members.
        workloads: the calls to tune for.
        device: the GPU.
        directory: folder of the file; the package reads it from ``launch_configs.CONFIGS``.
        measure: µs per call of several calls that do the same on different data.

    Returns:
        The file's path.

    Raises:
        ValueError: if ``kernel`` is unknown, or there are no workloads.
        RuntimeError: inside the capture of a CUDA graph, or if a configuration gives a wrong result.
    """
    if kernel not in PATHS_OF or not workloads:
        raise ValueError(f"expected a kernel of {', '.join(PATHS_OF)} and workloads, got {kernel!r}, {len(workloads)}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning launches and times kernels; run it before the capture of a CUDA graph, not inside")
    device = torch.device(device)
    measured: dict[LaunchKey, tuple[Config, float]] = {}
    for workload in workloads:
        key = workload_key(workload)
        measured[key] = _fastest(kernel, workload, key, device, measure)
    return save(kernel, gpu_of(device).name, measured, directory)


def workload_key(workload: Workload) -> LaunchKey:
    """The key of a workload's configuration."""
    width, rank = (sum(column) for column in zip(*workload.members, strict=True))
    return LaunchKey.of(workload.rows, width, workload.in_features, rank, workload.dtype, len(workload.members))


def _fastest(
    kernel: str, workload: Workload, key: LaunchKey, device: torch.device, measure: Measure
) -> tuple[Config, float]:
    """Optimize one field at a time on each path, and return the best configuration of all paths."""
    run = _RUN[kernel]
    inputs = list(_inputs(workload, device))
    start = rule_of_thumb(kernel, key, gpu_of(device))
    expected = run(*inputs[0], replace(start, path="gemms"))

    def time(config: Config) -> float | None:
        """µs per call; ``None`` if the configuration needs more registers or shared memory than the GPU has."""
        try:
            _check(run(*inputs[0], config), expected, config)
        except OutOfResources:
            return None
        return measure([functools.partial(run, x, factors, config) for x, factors in inputs])

    best: tuple[Config, float] | None = None
    for path in PATHS_OF[kernel]:
        config = on_path(start, path, key)
        if serves(config, key):
            best = _descend(config, STEPS[path] if path != "gemms" or kernel == "lowrank_glu" else {}, time, best)
    assert best is not None
    return best


def _descend(
    config: Config,
    steps: dict[str, tuple[Any, ...]],
    time: Callable[[Config], float | None],
    best: tuple[Config, float] | None,
) -> tuple[Config, float] | None:
    """The faster of ``best`` and ``config`` after each field in turn was set to its fastest value."""
    fastest = time(config)
    for field, values in steps.items():
        for value in values:
            candidate = replace(config, **{field: value})
            microseconds = time(candidate) if candidate != config else None
            if microseconds is not None and (fastest is None or microseconds < GAIN * fastest):
                config, fastest = candidate, microseconds
    if fastest is None or (best is not None and best[1] <= fastest):
        return best
    return config, fastest


def _inputs(workload: Workload, device: torch.device) -> Iterator[tuple[Tensor, list[Factors]]]:
    """x and packed factors of each call; so many calls that no factors are in the L2 cache when a call starts."""
    rows, K, members, dtype = workload
    size = sum(R * (N + K) for N, R in members) * dtype.itemsize
    calls = max(MIN_CALLS, -(-COLD_BYTES // size)) if device.type == "cuda" else 1
    for _ in range(calls):
        factors = [
            Factors(
                torch.randn(N, R, device=device, dtype=dtype) * R**-0.5,
                None,
                torch.randn(R, K, device=device, dtype=dtype) * K**-0.5,
            )
            for N, R in members
        ]
        yield torch.randn(rows, K, device=device, dtype=dtype), pack_factors(factors)


def _check(got: Sequence[Tensor], expected: Sequence[Tensor], config: Config) -> None:
    """Refuse to time a wrong kernel."""
    for y, expected_y in zip(got, expected, strict=True):
        error = float((y.double() - expected_y.double()).norm() / expected_y.double().norm())
        if not error <= AGREEMENT[y.dtype]:
            raise RuntimeError(f"{config} is off by {error:.1e}, expected at most {AGREEMENT[y.dtype]:.0e}")


def _run_glu(x: Tensor, factors: Sequence[Factors], config: Config) -> list[Tensor]:
    gate, up = factors
    return [run_glu(x, gate, up, "silu", config)]


_RUN: dict[str, Callable[[Tensor, Sequence[Factors], Config], list[Tensor]]] = {
    "lowrank_linear": run_linear,
    "lowrank_glu": _run_glu,
}
