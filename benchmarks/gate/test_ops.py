from __future__ import annotations

from typing import Any

import pytest
import torch

from grasp.bench.plugin import Gate
from grasp.bench.timing import batch
from grasp.bench.workloads import OPS, Problem, backends, make_problem, rotations, wrong
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.shapes import format_shape, parse_shape

BASELINES = ("unfused", "dense")
TIMED_SHAPES = ("4096x4096r204", "576x1536r41")
TINY_SHAPES = ("63x48r5",)  # where each op only runs once
ROTATION = 1 << 30  # bytes of weights, more than a cache holds
CALLS = 32  # in a round of a baseline


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shapes" in metafunc.fixturenames:
        config = metafunc.config
        timed = config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")
        metafunc.parametrize("shapes", TIMED_SHAPES if timed else TINY_SHAPES)


@pytest.fixture(params=OPS)
def op(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=[1, 16])
def rows(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture
def problem(gate: Gate, benchmark: Any, op: str, shapes: str, rows: int, dtype: torch.dtype) -> Problem:
    shape = OPS[op].fit(parse_shape(shapes))
    assert shape is not None
    benchmark.group = f"{op} {format_shape(shape)} M={rows} {str(dtype).removeprefix('torch.')}"
    return make_problem(op, shape, rows, dtype, gate.device)


@pytest.mark.parametrize("provider", [row.name for row in BACKENDS])
@torch.inference_mode()
def test_backend(benchmark: Any, gate: Gate, op: str, shapes: str, problem: Problem, provider: str) -> None:
    """A backend against two plain calls, gated by its correctness."""
    runs, reasons = backends(op, parse_shape(shapes), problem)
    if provider in reasons:
        pytest.skip(f"{provider}: {reasons[provider]}")
    assert (complaint := wrong(op, problem, runs[provider])) is None, complaint
    copies = rotations(op, problem, ROTATION if benchmark.enabled else 0)["low-rank"].copies
    gate(runs[provider], OPS[op].unfused, copies, label=f"{benchmark.group} {provider}", against="unfused")


@pytest.mark.parametrize("provider", BASELINES)
@torch.inference_mode()
def test_baseline(benchmark: Any, gate: Gate, op: str, problem: Problem, provider: str) -> None:
    """What backends are compared with, for the table of times; not guarded, for it is not our code."""
    run = {"unfused": OPS[op].unfused, "dense": OPS[op].dense}[provider]
    if not benchmark.enabled:
        benchmark(run, problem)
        return
    rotation = rotations(op, problem, ROTATION)["dense" if provider == "dense" else "low-rank"]
    benchmark.extra_info["calls_per_round"] = CALLS
    benchmark(batch(gate.device, run, rotation, CALLS).run)
