from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import Factors, cpu, lowrank_linear, lowrank_linear_grouped, ops
from grasp_kernels.dispatch import CPU_ROWS, backend_missing
from tests.ops.inputs import DTYPES, factors, normal, seeded

if (reason := backend_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
K, N, R = 40, 24, 6


def operands(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (1, K)) -> tuple[Tensor, Factors]:
    generator = seeded()
    return normal(shape, generator, dtype=dtype), factors(N, K, R, generator, s=True, bias=True, dtype=dtype)


def direct(x: Tensor, *group: Tensor | None, backend: object = "auto") -> Tensor | None:
    """The short way alone."""
    return ops._direct_linear(x, *group, backend)


@pytest.fixture
def no_long_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the long way was gone")

    monkeypatch.setattr(ops, "check_factors", fail)


SHAPES = ((1, K), (K,), (1, 1, K), (2, 3, K), (2, 1, 3, 1, K), (7, K))


@pytest.mark.usefixtures("no_long_way")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_short_way_gives_what_the_kernel_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, group = operands(dtype, shape)
    for U, s, Vh, bias in (group, group._replace(s=None), group._replace(bias=None)):
        for singular in (s, None if s is None else s.to(dtype)):
            y = lowrank_linear(x, U, singular, Vh, bias)
            expected = cpu.lowrank_linear(x.reshape(-1, K), U, singular, Vh, bias)
            assert y.shape == (*shape[:-1], N)
            assert y.is_contiguous()
            assert torch.equal(y, expected.view_as(y))


@pytest.mark.usefixtures("no_long_way")
def test_a_group_goes_the_short_way_together() -> None:
    generator = seeded()
    x = normal((2, 1, K), generator, dtype=torch.bfloat16)
    groups = [
        factors(N + i, K, R + i, generator, s=i % 2 == 0, bias=i % 2 == 1, dtype=torch.bfloat16) for i in range(3)
    ]
    for sequence in (groups, tuple(groups)):
        outputs = lowrank_linear_grouped(x, sequence)
        assert isinstance(outputs, tuple)
        for y, group in zip(outputs, groups, strict=True):
            assert torch.equal(y, lowrank_linear(x, *group))


@pytest.mark.usefixtures("no_long_way")
def test_strides_that_a_kernel_reads_in_place() -> None:
    x, group = operands(shape=(2, 3, K))
    wide = torch.full((2, 3, 2 * K), torch.nan)
    wide[..., :K] = x
    expected = lowrank_linear(x, *group)
    assert torch.equal(lowrank_linear(wide[..., :K], *group), expected)
    padded = torch.full((N, R + 5), torch.nan)
    padded[:, :R] = group.U
    assert torch.equal(lowrank_linear(x, padded[:, :R], *group[1:]), expected)
    repeated = x[:1].expand(4, 3, K)[:, 0]
    assert torch.equal(lowrank_linear(repeated, *group), lowrank_linear(repeated.contiguous(), *group))


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class FunctionMode(torch.overrides.TorchFunctionMode):
    pass


class Subclass(Tensor):
    pass


SURROUNDINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "dispatch mode": Mode,
    "function mode": FunctionMode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
}
# What is done to (x, U, s, Vh, bias) that makes the call another's.
UNUSUAL: dict[str, Callable[..., tuple[Any, ...]]] = {
    "float64": lambda *tensors: tuple(t.double() for t in tensors),
    "x of another dtype": lambda x, *group: (x.bfloat16(), *group),
    "U of another dtype": lambda x, U, *rest: (x, U.half(), *rest),
    "s of another dtype": lambda x, U, s, *rest: (x, U, s.half(), *rest),
    "bias of another dtype": lambda *tensors: (*tensors[:-1], tensors[-1].half()),
    "a subclass": lambda x, *group: (x.as_subclass(Subclass), *group),
    "a negated view": lambda x, U, *rest: (x, torch._neg_view(U), *rest),
    "a parameter that takes a gradient": lambda x, U, *rest: (x, nn.Parameter(U), *rest),
    "x that takes a gradient": lambda x, *group: (x.clone().requires_grad_(), *group),
    "meta tensors": lambda *tensors: tuple(t.to("meta") for t in tensors),
    "a sparse factor": lambda x, U, *rest: (x, U.to_sparse(), *rest),
    "U that is transposed": lambda x, U, *rest: (x, U.mT.contiguous().mT, *rest),
    "U whose rows overlap": lambda x, U, *rest: (x, U.as_strided(U.shape, (1, 1)), *rest),
    "x that has no common stride": lambda x, *group: (x.expand(2, 3, K)[:, ::2].mT.contiguous().mT, *group),
    "a scalar x": lambda x, *group: (x[0, 0], *group),
    "x of another width": lambda x, *group: (x[:, 1:], *group),
    "U of another rank": lambda x, U, *rest: (x, U[:, 1:], *rest),
    "U of three dimensions": lambda x, U, *rest: (x, U[None], *rest),
    "s of another length": lambda x, U, s, *rest: (x, U, s[1:], *rest),
    "s of two dimensions": lambda x, U, s, *rest: (x, U, s[None], *rest),
    "bias of another length": lambda *tensors: (*tensors[:-1], tensors[-1][1:]),
    "no columns": lambda x, U, s, Vh, bias: (x[:, :0], U, s, Vh[:, :0], bias),
    "no ranks": lambda x, U, s, Vh, bias: (x, U[:, :0], s[:0], Vh[:0], bias),
    "no U": lambda x, U, *rest: (x, None, *rest),
    "no tensor": lambda x, *group: (x.tolist(), *group),
    "too many dimensions": lambda x, *group: (x[(None,) * 8], *group),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_is_unusual_is_declined(name: str) -> None:
    x, group = operands()
    assert direct(x, *group) is not None
    assert direct(*UNUSUAL[name](x, *group)) is None
    assert sys.exc_info() == (None, None, None)
    assert direct(x, *group) is not None


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_where_something_watches_a_call_is_declined(name: str) -> None:
    x, group = operands()
    with SURROUNDINGS[name]():
        assert direct(x, *group) is None
    assert direct(x, *group) is not None


@pytest.mark.parametrize(
    "transform", [torch.func.functionalize, torch.func.vmap, torch.func.grad], ids=lambda transform: transform.__name__
)
def test_transforms_are_declined(transform: Callable[..., Callable[..., Tensor]]) -> None:
    answers = []

    def f(x: Tensor, other: Tensor) -> Tensor:
        answers.extend([direct(x, *group), direct(other, *group)])
        return x.sum()

    x, group = operands()
    transform(f)(x, x)
    assert answers == [None, None]


def test_gradients_count_only_where_they_are_recorded() -> None:
    x, group = operands()
    parameters = [nn.Parameter(tensor) for tensor in group if tensor is not None]
    assert direct(x, *parameters) is None
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = direct(x, *parameters)
        assert y is not None
        assert torch.equal(y, lowrank_linear(x, *group))
        assert not y.requires_grad
        assert y.is_inference() == (off is torch.inference_mode)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_it_serves_the_rows_that_the_table_gives_it(dtype: torch.dtype) -> None:
    few, group = operands(dtype, (CPU_ROWS[dtype], K))
    many = few.new_zeros(CPU_ROWS[dtype] + 1, K)
    assert direct(few, *group) is not None
    assert direct(many, *group) is None
    assert direct(many, *group, backend="cpu") is not None
    for other in ("reference", "triton", "Auto", "", None, 0):
        assert direct(few, *group, backend=other) is None


def test_malformed_calls_are_declined() -> None:
    x, group = operands()
    module = cpu._module()
    assert module.lowrank_linear(x, *group) is None
    assert module.lowrank_linear() is None
    groups: tuple[object, ...] = ([], {}, iter([group]), [group] * 9, [group[:3]], [list(group)], None)
    for wrong in groups:
        assert module.lowrank_linear_grouped(x, wrong, "auto") is None
    assert module.lowrank_linear_grouped(x, [group]) is None
    assert sys.exc_info() == (None, None, None)


def test_more_groups_than_the_short_way_takes_go_the_long_one() -> None:
    x, group = operands()
    outputs = lowrank_linear_grouped(x, [group] * 9)
    assert all(torch.equal(y, lowrank_linear(x, *group)) for y in outputs)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads", "no_long_way")
def test_concurrent_callers_do_not_disturb_each_other() -> None:
    generator = seeded()
    x = normal((1, 600), generator, dtype=torch.bfloat16)
    group = factors(500, 600, 130, generator, s=True, bias=True, dtype=torch.bfloat16)
    expected, wrong = lowrank_linear(x, *group), []

    def call() -> None:
        for _ in range(200):
            if not torch.equal(lowrank_linear(x, *group), expected):
                wrong.append(threading.get_ident())

    threads = [threading.Thread(target=call) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("unusual", [False, True])
def test_calls_leave_nothing_behind(unusual: bool) -> None:
    x, group = operands()
    arguments = UNUSUAL["bias of another length"](x, *group) if unusual else (x, *group)

    def resident_bytes(calls: int) -> int:
        for _ in range(calls):
            direct(*arguments)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before, counts = resident_bytes(1000), [sys.getrefcount(each) for each in arguments]
    assert resident_bytes(100_000) - before < 2 << 20
    assert [sys.getrefcount(each) for each in arguments] == counts
