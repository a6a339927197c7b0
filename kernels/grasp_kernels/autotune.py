"""Measure launch configurations on this machine's GPU and save the fastest; ``grasp bench tune`` runs this."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import OutOfResources

from . import gradient_configs
from .gradient_configs import Measurement, Tile, candidates
from .launch_configs import CONFIGS, PATHS, Config, LaunchKey, on_path, rule_of_thumb, save, serves
from .packing import pack_factors
from .reference import Factors
from .routes import chunked
from .triton.launch import gpu_of
from .triton.lowrank_glu import run as run_glu
from .triton.lowrank_linear import run as run_linear
from .triton.singular_value_grad import describable, loadable
from .triton.singular_value_grad import run as run_gradient

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
        "stages": (2, 3, 4, 6, 8),
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
KERNELS = (*PATHS_OF, gradient_configs.KERNEL)
SUMS = (None, False, "none", None)  # the gradient's options: one sum over all tokens

Measure = Callable[[Sequence[Callable[[], Any]]], float]


class Workload(NamedTuple):
    """A call to tune for: M rows of K features, and (N, R) of each member of the group, all pivoted or none."""

    rows: int
    in_features: int
    members: tuple[tuple[int, int], ...]
    dtype: torch.dtype = torch.bfloat16
    pivoted: bool = False


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
        kernel: one of ``KERNELS``. ``"lowrank_linear"`` also takes grouped calls, workloads of ``"lowrank_glu"`` have
            two members, and those of ``"singular_value_grad"`` one; ``"auto"`` takes the last only where it was faster
            than two matrix products.
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
    if kernel not in KERNELS or not workloads:
        raise ValueError(f"expected a kernel of {', '.join(KERNELS)} and workloads, got {kernel!r}, {len(workloads)}")
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("tuning launches and times kernels; run it before the capture of a CUDA graph, not inside")
    device = torch.device(device)
    if kernel == gradient_configs.KERNEL:
        tiles = [_fastest_tile(workload, device, measure) for workload in workloads]
        return gradient_configs.save(gpu_of(device).name, tiles, directory)
    measured: dict[LaunchKey, tuple[Config, float]] = {}
    for workload in workloads:
        key = workload_key(workload)
        measured[key] = _fastest(kernel, workload, key, device, measure)
    return save(kernel, gpu_of(device).name, measured, directory)


def workload_key(workload: Workload) -> LaunchKey:
    """The key of a workload's configuration."""
    rows, in_features, members, dtype, pivoted = workload
    width, rank = (sum(column) for column in zip(*members, strict=True))
    return LaunchKey.of(rows, width, in_features, rank, dtype, len(members), rank * pivoted)


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
            _check(run(*inputs[0], config), expected, workload.dtype, config)
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
    rows, K, members, dtype, pivoted = workload
    size = sum(R * (N - R * pivoted + K) for N, R in members) * dtype.itemsize
    for _ in range(max(MIN_CALLS, _cold_calls(size)) if device.type == "cuda" else 1):
        packed = pack_factors(
            [
                Factors(
                    torch.randn(N - R * pivoted, R, device=device, dtype=dtype) * R**-0.5,
                    None,
                    torch.randn(R, K, device=device, dtype=dtype) * K**-0.5,
                )
                for N, R in members
            ]
        )
        orders = [torch.randperm(N, device=device, dtype=torch.int32) if pivoted else None for N, _ in members]
        factors = [group._replace(order=order) for group, order in zip(packed, orders, strict=True)]
        yield torch.randn(rows, K, device=device, dtype=dtype), factors


def _cold_calls(size: int) -> int:
    return -(-COLD_BYTES // size)


def _check(got: Sequence[Tensor], expected: Sequence[Tensor], dtype: torch.dtype, config: Config | Tile) -> None:
    """Refuse to time a wrong kernel; ``dtype`` is that of its inputs."""
    for y, expected_y in zip(got, expected, strict=True):
        error = float((y.double() - expected_y.double()).norm() / expected_y.double().norm())
        if not error <= AGREEMENT[dtype]:
            raise RuntimeError(f"{config} is off by {error:.1e}, expected at most {AGREEMENT[dtype]:.0e}")


def _fastest_tile(workload: Workload, device: torch.device, measure: Measure) -> Measurement:
    """The times of the gradient's fastest tile and of two matrix products."""
    (_, R), dtype = workload.members[0], workload.dtype
    inputs = list(_gradient_inputs(workload, device))
    # Calls would copy factors only once; a graph would copy them in every replay.
    loaded = [(x, grad_y, loadable(U, 1), loadable(Vh, 0)) for x, grad_y, U, Vh in inputs]
    expected = chunked(*inputs[0], *SUMS)[:1]
    microseconds: dict[Tile, float] = {}
    for tile in candidates(gpu_of(device), dtype, described=all(map(describable, inputs[0][:2]))):
        try:
            _check(run_gradient(*loaded[0], *SUMS, tile)[:1], expected, dtype, tile)
        except OutOfResources:
            continue
        microseconds[tile] = measure([functools.partial(run_gradient, *tensors, *SUMS, tile) for tensors in loaded])
    products = measure([functools.partial(chunked, *tensors, *SUMS) for tensors in inputs])
    fastest = min(microseconds, key=lambda tile: microseconds[tile])
    return Measurement(workload.rows, R, str(dtype).removeprefix("torch."), fastest, microseconds[fastest], products)


def _gradient_inputs(workload: Workload, device: torch.device) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """x, grad_y, U and Vh of each call; so many calls that none of them is in the L2 cache when a call starts."""
    rows, K, ((N, R),), dtype, _ = workload
    shapes = ((rows, K), (rows, N), (N, R), (R, K))
    size = sum(map(math.prod, shapes)) * dtype.itemsize
    for _ in range(1 + _cold_calls(size) if device.type == "cuda" else 1):
        x, grad_y, U, Vh = (torch.randn(shape, device=device, dtype=dtype) for shape in shapes)
        yield x, grad_y, U, Vh


def _run_glu(x: Tensor, factors: Sequence[Factors], config: Config) -> list[Tensor]:
    gate, up = factors
    return [run_glu(x, gate, up, "silu", config)]


_RUN: dict[str, Callable[[Tensor, Sequence[Factors], Config], list[Tensor]]] = {
    "lowrank_linear": run_linear,
    "lowrank_glu": _run_glu,
}
