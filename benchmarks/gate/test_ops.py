from __future__ import annotations

from typing import Any

import pytest
import torch

from grasp.bench.workloads import ATTENTION, OPS, SMALL_MLP, Problem, backends, make_problem, rotation, wrong
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.shapes import format_shape, parse_shape
from speedgate.fixture import Gate

TIMED_SHAPES = (ATTENTION, SMALL_MLP)
TINY_SHAPES = ("63x48r5",)  # with timing disabled, each op runs once
ROTATION = 1 << 30  # bytes of weights, more than a cache holds


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
    return make_problem(op, shape, rows, dtype, torch.device(gate.device))


@pytest.mark.parametrize("provider", [row.name for row in BACKENDS])
@torch.inference_mode()
def test_backend(benchmark: Any, gate: Gate, op: str, shapes: str, problem: Problem, provider: str) -> None:
    runs, reasons = backends(op, parse_shape(shapes), problem)
    if provider in reasons:
        pytest.skip(f"{provider}: {reasons[provider]}")
    assert (complaint := wrong(op, problem, runs[provider])) is None, complaint
    copies = rotation(op, problem, ROTATION if benchmark.enabled else 0).copies
    gate(runs[provider], OPS[op].unfused, copies, label=f"{benchmark.group} {provider}", against="unfused")
