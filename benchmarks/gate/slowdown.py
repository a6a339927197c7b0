"""A pytest plugin that slows one op of the benchmarks down, for ``benchmarks.gate.selftest``."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from torch import Tensor

from grasp.bench.workloads import OPS, Problem

SLOWDOWN = 0.3  # fraction of the op's own time


def slowed(run: Callable[[str, Problem], list[Tensor]]) -> Callable[[str, Problem], list[Tensor]]:
    """``run``, followed by a busy loop that takes ``SLOWDOWN`` of its time."""

    def busy(backend: str, problem: Problem) -> list[Tensor]:
        start = time.perf_counter()
        result = run(backend, problem)
        end = time.perf_counter()
        until = end + SLOWDOWN * (end - start)
        while time.perf_counter() < until:
            pass
        return result

    return busy


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the option."""
    parser.addoption("--slow-op", choices=tuple(OPS), required=True, help="The op to slow down.")


def pytest_configure(config: pytest.Config) -> None:
    """Replace the op by its slow form."""
    name = config.option.slow_op
    OPS[name] = replace(OPS[name], run=slowed(OPS[name].run))
