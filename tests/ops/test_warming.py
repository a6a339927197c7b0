"""After a warm-up no call needs the compiler: Triton meets no new kernel, constant or specialisation of arguments."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from grasp_kernels import (
    Factors,
    launch_configs,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    warm_up,
)
from grasp_kernels.triton import lowrank_glu as glu
from grasp_kernels.triton import lowrank_linear as linear
from grasp_kernels.triton.launch import Gpu, Launch
from tests.ops.inputs import factors, normal, pivoted, seeded

H100 = Gpu("H100", 132, 90)
K, N = 512, 128
SIZES = (1, 2, 3, 8, 11, 16, 17, 33, 64, 65, 150, 300, 513)


def specialised(name: str, value: Any, kind: object) -> Any:
    """The part of an argument that Triton compiles for."""
    if kind == "tl.constexpr" or value is None:
        return value
    if isinstance(value, tuple):
        return tuple(specialised(name, item, kind) for item in value)
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    return None if name == "M" else (value == 1, value % 16 == 0)


class Model(nn.Module):
    """q, k, v in one call, o alone, a gated unit, and a merged call; unequal ranks, some packed, some not."""

    def __init__(self, dtype: torch.dtype, backend: str) -> None:
        super().__init__()
        generator = seeded()

        def group(rank: int, bias: bool = False) -> Factors:
            return factors(N, K, rank, generator, s=False, bias=bias, dtype=dtype)

        self.qkv = [group(208), group(80, bias=True), group(81)]
        self.o, self.gate, self.up = group(100), group(304), group(299)
        self.backend = backend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = lowrank_linear_grouped(x, self.qkv, backend=self.backend)
        merged = lowrank_linear_merged(x, self.qkv, backend=self.backend)
        o = lowrank_linear(x, *self.o, backend=self.backend)
        return q + k + v + o + lowrank_glu(x, self.gate, self.up, backend=self.backend) + merged[..., :N]


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> set[Any]:
    """Everything that Triton compiled; the kernels do not run, and the card is an H100."""
    keys: set[Any] = set()

    def record(launches: Iterable[Launch], device: torch.device) -> list[None]:
        for launch in launches:
            kinds = {name: p.annotation for name, p in inspect.signature(launch.kernel.fn).parameters.items()}
            arguments = [(name, specialised(name, value, kinds[name])) for name, value in launch.arguments.items()]
            keys.add((launch.kernel.fn.__name__, *sorted(arguments), *sorted(launch.options.items())))
        return [None for _ in launches]

    for module in (linear, glu):
        monkeypatch.setattr(module, "run_all", record)
        monkeypatch.setattr(module, "gpu_of", lambda _: H100)
    return keys


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_no_later_call_needs_the_compiler(dtype: torch.dtype, compiled: set[Any]) -> None:
    model = Model(dtype, "triton")
    warm_up(model, normal((2, 16, K), seeded(), dtype=dtype))
    before = set(compiled)
    assert len({key[0] for key in before}) == 3  # shrink, expand, the gated expand
    for rows in SIZES:
        model(normal((rows, K), seeded(), dtype=dtype))
    assert compiled == before


def test_the_kernel_after_the_matrix_product_of_pivoted_factors_is_prepared(
    compiled: set[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch_configs, "UNTUNED_PAIR_ROWS", launch_configs.PAIR_ROWS)  # as a measurement may choose
    dtype = torch.bfloat16
    group = pivoted(N, K, 80, seeded(), bias=True, dtype=dtype)
    warm_up(lambda x: lowrank_linear(x, *group, backend="triton"), normal((1, K), seeded(), dtype=dtype))
    before = set(compiled)
    lowrank_linear(normal((600, K), seeded(), dtype=dtype), *group, backend="triton")
    assert compiled == before


def test_only_the_rows_named_are_prepared(compiled: set[Any]) -> None:
    model = Model(torch.bfloat16, "triton")
    warm_up(model, normal((1, K), seeded(), dtype=torch.bfloat16), rows=[2])
    before = set(compiled)
    model(normal((2, K), seeded(), dtype=torch.bfloat16))
    assert compiled == before
    model(normal((16, K), seeded(), dtype=torch.bfloat16))
    assert compiled > before


def test_nothing_is_repeated_on_a_cpu_and_the_model_runs_without_gradients() -> None:
    seen: list[tuple[int, bool]] = []

    def model(x: Tensor) -> Tensor:
        seen.append((len(x), torch.is_grad_enabled()))
        return lowrank_linear(x, torch.ones(4, 2), None, torch.ones(2, 8))

    warm_up(model, torch.ones(3, 8))
    assert seen == [(3, False)]


def test_rows_are_positive() -> None:
    with pytest.raises(ValueError, match="at least 1, got 0"):
        warm_up(lambda: None, rows=[4, 0])
