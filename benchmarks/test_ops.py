from __future__ import annotations

from typing import Any

import pytest
import torch

from grasp.bench.timing import batch
from grasp.bench.workloads import OPS, backends, make_problem, rotations, wrong
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.shapes import format_shape, parse_shape

BASELINES = ("unfused", "dense")
TIMED_SHAPES = ("4096x4096r204", "576x1536r41")
TINY_SHAPES = ("63x48r5",)  # where each op only runs once
ROTATION = 1 << 30  # bytes of weights, more than a cache holds
CALLS = 32  # in a round, of every provider
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def is_timed(config: pytest.Config) -> bool:
    return bool(config.getoption("benchmark_enable")) or not config.getoption("benchmark_disable")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shapes" in metafunc.fixturenames:
        metafunc.parametrize("shapes", TIMED_SHAPES if is_timed(metafunc.config) else TINY_SHAPES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("provider", [*(row.name for row in BACKENDS), *BASELINES])
@pytest.mark.parametrize("op", OPS)
@torch.inference_mode()
def test_op(
    benchmark: Any, pytestconfig: pytest.Config, op: str, shapes: str, provider: str, rows: int, dtype: torch.dtype
) -> None:
    shape = OPS[op].fit(parse_shape(shapes))
    assert shape is not None
    problem = make_problem(op, shape, rows, dtype, DEVICE)
    runs, reasons = backends(op, shape, problem)
    if provider in reasons:
        pytest.skip(f"{provider}: {reasons[provider]}")
    run = {**runs, "unfused": OPS[op].unfused, "dense": OPS[op].dense}[provider]
    if provider not in BASELINES:
        assert (complaint := wrong(op, problem, run)) is None, complaint

    benchmark.group = f"{op} {format_shape(shape)} M={rows} {dtype}"
    benchmark.extra_info.update(
        op=op,
        shape=format_shape(shape),
        rows=rows,
        dtype=str(dtype),
        provider=provider,
        calls_per_round=CALLS,
    )
    if is_timed(pytestconfig):
        rotation = rotations(op, problem, ROTATION)["dense" if provider == "dense" else "low-rank"]
        benchmark(batch(DEVICE, run, rotation, CALLS).run)
    else:
        benchmark(run, problem)
