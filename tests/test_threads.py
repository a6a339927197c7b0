"""Threads that change everything which others compute with; `pytest --fuzz` runs it longer, `make sanitize` too.

Memory of a tensor is not replaced or resized while another thread computes with it: no op of PyTorch allows that.
"""

from __future__ import annotations

import random
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from grasp.model.grouping import group_linears_
from grasp.model.lowrank_linear import LowRankLinear, set_backend_
from grasp_kernels import (
    Factors,
    available_backends,
    cpu,
    direct,
    dispatch,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
)
from tests.lowrank_models import Attention

K, N, WIDTHS = 40, 24, (24, 16, 16)
BACKENDS = [name for name in available_backends() if name in ("cpu", "reference")]
WATCHERS = direct.DIRECT_WATCHERS


def open_direct_path(watchers: tuple[Callable[[], object], ...]) -> None:
    if "cpu" in BACKENDS:
        cpu.open_direct_path(direct.PLAIN_TYPES, watchers, dispatch.CPU_ROWS)


def fresh(rng: random.Random) -> Factors:
    rank = rng.randint(1, 9)
    bias = torch.randn(N) if rng.random() < 0.5 else None
    return Factors(torch.randn(N, rank), torch.randn(rank) if rng.random() < 0.5 else None, torch.randn(rank, K), bias)


class Shared:
    """What all threads see."""

    def __init__(self) -> None:
        self.items: list[Any] = [fresh(random.Random(i)) for i in range(4)]
        self.backend = "auto"
        self.model = Attention(*(LowRankLinear(K, width, 5) for width in WIDTHS))
        self.x = torch.randn(1, K)

    # --- threads that change it ---

    def change_list(self, rng: random.Random) -> None:
        if rng.random() < 0.02:
            self.items.clear()
        if len(self.items) < rng.randint(1, 9):
            self.items.append(fresh(rng))
        for i in range(len(self.items)):
            self.items[i : i + 1] = [fresh(rng) if rng.random() < 0.97 else list(fresh(rng))]

    def change_inner_lists(self, rng: random.Random) -> None:
        for item in list(self.items):
            if isinstance(item, list):
                item[:] = fresh(rng)

    def change_backend(self, rng: random.Random) -> None:
        self.backend = "".join(rng.choice(["auto", *BACKENDS]))  # a new string
        set_backend_(self.model, self.backend)

    def change_watchers(self, rng: random.Random) -> None:
        def watch() -> None:
            self.items[:] = [fresh(rng)]

        open_direct_path((*WATCHERS, watch) if rng.random() < 0.5 else WATCHERS)
        time.sleep(1e-3)  # the direct path of each call stays in memory

    def change_parameters(self, rng: random.Random) -> None:
        layer = rng.choice([self.model.q_proj, self.model.k_proj, self.model.v_proj])
        layer.U = nn.Parameter(torch.randn_like(layer.U), requires_grad=rng.random() < 0.5)
        layer.bias = nn.Parameter(torch.randn(layer.out_features))

    def change_groups(self, rng: random.Random) -> None:
        group_linears_(self.model, rng.random() < 0.5)

    # --- threads that compute with it ---

    def call_group(self, _: random.Random) -> list[Tensor]:
        return list(lowrank_linear_grouped(self.x, self.items, backend=self.backend))

    def call_one(self, _: random.Random) -> list[Tensor]:
        return [lowrank_linear(self.x, *item, backend=self.backend) for item in list(self.items)]

    def call_glu(self, _: random.Random) -> list[Tensor]:
        gates = self.items[:2]
        return [lowrank_glu(self.x, *gates)] if len(gates) == 2 else []

    def call_model(self, rng: random.Random) -> list[Tensor]:
        with torch.set_grad_enabled(rng.random() < 0.5):
            y = self.model(self.x)
        return [y[:, :N], y[:, N:].reshape(-1, sum(WIDTHS[1:]))]


CHANGES = (
    "change_list",
    "change_inner_lists",
    "change_backend",
    "change_watchers",
    "change_parameters",
    "change_groups",
)
CALLS = ("call_group", "call_group", "call_one", "call_glu", "call_model")


@pytest.fixture
def quick_switches() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)
    open_direct_path(WATCHERS)


@pytest.mark.usefixtures("quick_switches")
def test_nothing_that_other_threads_change_makes_a_call_crash_or_wrong(fuzzing: bool) -> None:
    shared, counts = Shared(), Counter[str]()
    end = time.monotonic() + (60 if fuzzing else 2)

    def repeat(name: str, seed: int) -> None:
        rng, act = random.Random(seed), getattr(shared, name)
        while time.monotonic() < end:
            try:
                check(act(rng))
                counts[name] += 1
            except (ValueError, TypeError):  # what it saw did not agree
                counts[f"{name} refused"] += 1

    names = (*CHANGES, *CALLS)
    with ThreadPoolExecutor(len(names)) as pool:
        for future in [pool.submit(repeat, name, seed) for seed, name in enumerate(names)]:
            future.result()
    print(f"\nthreads: {dict(counts)}")
    assert all(counts[name] > 0 for name in names)


def check(outputs: list[Tensor] | None) -> None:
    for y in outputs or ():
        assert y.shape[0] == 1
        assert torch.isfinite(y).all()
