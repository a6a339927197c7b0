from __future__ import annotations

import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import (
    Dense,
    Factors,
    cpu,
    dispatch,
    explain,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    ops,
    reference,
    registered,
    singular_value_grad,
)
from grasp_kernels import direct as direct_path
from grasp_kernels.dispatch import CPU_ROWS, DIRECT_DIMENSIONS, DIRECT_GROUPS, backend_missing
from grasp_kernels.extension import DTYPE_CODES
from tests.ops.inputs import DTYPES, factors, normal, seeded

if (reason := backend_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
K, N, R = 40, 24, 6


def operands(dtype: torch.dtype = torch.float32, shape: tuple[int, ...] = (1, K)) -> tuple[Tensor, Factors]:
    generator = seeded()
    return normal(shape, generator, dtype=dtype), factors(N, K, R, generator, s=True, bias=True, dtype=dtype)


def direct(x: Tensor, *group: Tensor | None, backend: object = "auto") -> Tensor | None:
    """The direct path alone."""
    return direct_path.linear(x, *group, backend)


@pytest.fixture
def no_registered_op(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("the call left the direct path")

    monkeypatch.setattr(ops, "check_factors", fail)


def test_a_dense_member_of_a_merged_linear_is_part_of_the_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("PyTorch's product")

    monkeypatch.setattr(registered, "linear", fail)
    x, (U, s, Vh, bias, *_) = operands()
    weight, dense_bias = (normal(shape, seeded(), dtype=x.dtype) for shape in ((16, K), (16,)))
    present = [True, True, True, True, *[False] * 3, True, False, False, True, *[False] * 3]
    lists = [U, weight], [s], [Vh], [bias, dense_bias], [], [], [], present
    y = torch.ops.grasp.lowrank_linear_merged(x, *lists, "auto")
    expected = torch.cat([reference.lowrank_linear(x, U, s, Vh, bias), x @ weight.mT + dense_bias], dim=-1)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    with FakeTensorMode(allow_non_fake_inputs=True):  # what a mode computes is not kept for real calls
        lowrank_linear_merged(x, [Factors(U, s, Vh, bias), Dense(weight[:7])])
    assert registered.merged_directly(x, [Factors(U, s, Vh, bias), Dense(weight[:7])], "auto") is not None
    with pytest.raises(AssertionError, match="PyTorch's product"):  # which is faster for many rows
        torch.ops.grasp.lowrank_linear_merged(x.expand(CPU_ROWS[x.dtype] + 1, K), *lists, "auto")


SHAPES = ((1, K), (K,), (1, 1, K), (2, 3, K), (2, 1, 3, 1, K), (7, K))


@pytest.mark.usefixtures("no_registered_op")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_direct_path_gives_what_the_kernel_gives(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, group = operands(dtype, shape)
    for U, s, Vh, bias, *_ in (group, group._replace(s=None), group._replace(bias=None)):
        for singular in (s, None if s is None else s.to(dtype)):
            y = lowrank_linear(x, U, singular, Vh, bias)
            expected = cpu.run(x.reshape(-1, K), [Factors(U, singular, Vh, bias)])[0]
            assert y.shape == (*shape[:-1], N)
            assert y.is_contiguous()
            assert torch.equal(y, expected.view_as(y))


@pytest.mark.usefixtures("no_registered_op")
def test_a_group_takes_the_direct_path_together() -> None:
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


@pytest.mark.usefixtures("no_registered_op")
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
# Changes of (x, U, s, Vh, bias) that make the direct path decline the call.
UNUSUAL: dict[str, Callable[..., tuple[Any, ...]]] = {
    "float64": lambda *tensors: tuple(None if t is None else t.double() for t in tensors),
    "x of another dtype": lambda x, *group: (x.bfloat16(), *group),
    "U of another dtype": lambda x, U, *rest: (x, U.half(), *rest),
    "s of another dtype": lambda x, U, s, *rest: (x, U, s.half(), *rest),
    "bias of another dtype": lambda x, U, s, Vh, bias, *rest: (x, U, s, Vh, bias.half(), *rest),
    "a subclass": lambda x, *group: (x.as_subclass(Subclass), *group),
    "a negated view": lambda x, U, *rest: (x, torch._neg_view(U), *rest),
    "a parameter that takes a gradient": lambda x, U, *rest: (x, nn.Parameter(U), *rest),
    "x that takes a gradient": lambda x, *group: (x.clone().requires_grad_(), *group),
    "meta tensors": lambda *tensors: tuple(None if t is None else t.to("meta") for t in tensors),
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
    "bias of another length": lambda x, U, s, Vh, bias, *rest: (x, U, s, Vh, bias[1:], *rest),
    "no columns": lambda x, U, s, Vh, *rest: (x[:, :0], U, s, Vh[:, :0], *rest),
    "no ranks": lambda x, U, s, Vh, *rest: (x, U[:, :0], s[:0], Vh[:0], *rest),
    "no U": lambda x, U, *rest: (x, None, *rest),
    "no tensor": lambda x, *group: (x.tolist(), *group),
    "too many dimensions": lambda x, *group: (x[(None,) * (DIRECT_DIMENSIONS - 1)], *group),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_arguments_are_declined(name: str) -> None:
    x, group = operands()
    assert direct(x, *group) is not None
    assert direct(*UNUSUAL[name](x, *group)) is None
    assert sys.exc_info() == (None, None, None)
    assert direct(x, *group) is not None


@pytest.mark.parametrize("name", SURROUNDINGS)
def test_calls_under_a_mode_autocast_or_forward_mode_are_declined(name: str) -> None:
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


def test_calls_that_record_gradients_are_declined() -> None:
    x, group = operands()
    parameters = [None if tensor is None else nn.Parameter(tensor) for tensor in group]
    assert direct(x, *parameters) is None
    for off in (torch.no_grad, torch.inference_mode):
        with off():
            y = direct(x, *parameters)
        assert y is not None
        assert torch.equal(y, lowrank_linear(x, *group))
        assert not y.requires_grad
        assert y.is_inference() == (off is torch.inference_mode)


@pytest.fixture
def selections(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The modules whose functions the table selects; a call on the direct path adds none."""
    modules: list[str] = []

    def select(*arguments: Any) -> Callable[..., Any]:
        function = dispatch.select(*arguments)
        modules.append(function.__module__.removeprefix("grasp_kernels"))
        return function

    monkeypatch.setattr(registered, "select", select)
    return modules


@pytest.fixture
def limits(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[dict[torch.dtype, int]], None]]:
    """Changes the table's most rows by dtype; the table hands them over as it does at import."""

    def change(rows: dict[torch.dtype, int]) -> None:
        for dtype, most in rows.items():
            monkeypatch.setitem(dispatch.CPU_ROWS, dtype, most)
        open_again()

    def open_again() -> None:
        dispatch._select.cache_clear()
        cpu.open_direct_path(direct_path.PLAIN_TYPES, direct_path.DIRECT_WATCHERS, CPU_ROWS)

    yield change
    monkeypatch.undo()
    open_again()


def run(op: str, rows: int, dtype: torch.dtype, groups: int) -> None:
    x, group = operands(dtype, (rows, K))
    if op == "lowrank_linear":
        lowrank_linear(x, *group)
    elif op == "lowrank_linear_grouped":
        lowrank_linear_grouped(x, [group] * groups)
    elif op == "lowrank_glu":
        lowrank_glu(x, group, group)
    else:
        singular_value_grad(x, x.new_ones(rows, N), group.U, group.Vh)


def check_explanation(selections: list[str], op: str, rows: int, dtype: torch.dtype, groups: int = 1) -> None:
    """A call runs on the path and the backend that ``explain`` names."""
    answers = explain(op, rows=rows, rank=R, dtype=dtype, groups=groups)
    selections.clear()
    run(op, rows, dtype, groups)
    chosen = next(row for row in dispatch.BACKENDS if answers[row.name] == "chosen")
    on_the_way = [] if answers["path"].startswith("direct") else [chosen.functions[op].partition(":")[0]]
    assert selections == on_the_way, answers


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_explain_agrees_with_what_runs_on_both_sides_of_the_limits(selections: list[str], dtype: torch.dtype) -> None:
    most = CPU_ROWS.get(dtype, 32)
    for rows in (0, 1, most, most + 1):
        for op in dispatch.OPS:
            check_explanation(selections, op, rows, dtype)
        for groups in (DIRECT_GROUPS, DIRECT_GROUPS + 1):
            check_explanation(selections, "lowrank_linear_grouped", rows, dtype, groups)


def test_a_limit_changed_in_the_table_changes_the_selection_and_the_direct_path(
    selections: list[str], limits: Callable[[dict[torch.dtype, int]], None]
) -> None:
    before = CPU_ROWS[torch.float32]
    for most in (2, before + 3):
        limits({torch.float32: most})
        for rows in (most, most + 1):
            check_explanation(selections, "lowrank_linear", rows, torch.float32)
            assert bool(selections) == (rows > most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_named_backend_takes_the_direct_path_with_any_rows(dtype: torch.dtype) -> None:
    many, group = operands(dtype, (CPU_ROWS[dtype] + 1, K))
    assert direct(many, *group) is None
    assert direct(many, *group, backend="cpu") is not None
    for other in ("reference", "triton", "Auto", "", None, 0):
        assert direct(many[:1], *group, backend=other) is None


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


def test_more_groups_than_the_direct_path_takes_give_the_same_outputs() -> None:
    x, group = operands()
    outputs = lowrank_linear_grouped(x, [group] * (DIRECT_GROUPS + 1))
    assert all(torch.equal(y, lowrank_linear(x, *group)) for y in outputs)


def test_x_may_have_as_many_dimensions_as_the_table_says() -> None:
    x, group = operands()
    assert direct(x[(None,) * (DIRECT_DIMENSIONS - 2)], *group) is not None
    assert f"more than {DIRECT_DIMENSIONS} dimensions" in explain("lowrank_linear", rows=1, rank=R)["path"]


@pytest.fixture
def opened() -> Iterator[Callable[..., None]]:
    """Opens the direct path with other functions of PyTorch; the table's are back after the test."""

    def open_with(**functions: Callable[..., object]) -> None:
        chosen = {name: functions.get(name, default) for name, default in FUNCTIONS.items()}
        watchers, *others = chosen.values()
        rows = tuple(CPU_ROWS[dtype] for dtype in DTYPE_CODES)
        cpu._module().set_up(direct_path.PLAIN_TYPES, (watchers,), vars(forward_ad), *others, rows)

    yield open_with
    cpu.open_direct_path(direct_path.PLAIN_TYPES, direct_path.DIRECT_WATCHERS, CPU_ROWS)


FUNCTIONS: dict[str, Callable[..., object]] = {
    "watcher": lambda: False,
    "is_neg": Tensor.is_neg,
    "is_grad_enabled": torch.is_grad_enabled,
    "get_num_threads": torch.get_num_threads,
}


def test_factors_stay_alive_that_leave_their_list_during_a_call(opened: Callable[..., None]) -> None:
    x, group = operands()
    alive, groups = [weakref.ref(tensor) for tensor in group if tensor is not None], [group]
    del group
    still: list[bool] = []

    def watch() -> bool:
        groups.clear()
        still.extend(reference() is not None for reference in alive)
        return True  # declined: nothing is read

    opened(watcher=watch)
    assert direct_path.grouped(x, groups, "auto") is None
    assert still == [True] * 4


@pytest.mark.parametrize("name", [*FUNCTIONS, "new_empty"])
def test_a_tensor_that_python_code_of_the_call_changes_is_read_afterwards(
    name: str, opened: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, group = operands()
    memory = group.U.untyped_storage()
    original = FUNCTIONS.get(name, Tensor.new_empty)

    def change(*arguments: Any) -> object:
        if not arguments or arguments[0] is group.bias or len(arguments) > 1:  # after U was looked at
            group.U.set_(torch.zeros(1, 1))  # the factors no longer agree
        return original(*arguments)

    if name == "new_empty":
        monkeypatch.setattr(Tensor, name, change)
        opened()
    else:
        opened(**{name: change})
    assert direct(x, *group) is None
    assert group.U.shape == (1, 1)
    del memory  # until here it was readable


def test_the_memory_of_x_is_that_after_the_outputs_are_made(
    opened: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, group = operands()
    memory, ones, new_empty = x.untyped_storage(), torch.ones_like(x), Tensor.new_empty
    expected = direct(ones, *group)

    def change(*arguments: Any) -> Tensor:
        x.set_(ones)
        return new_empty(*arguments)

    monkeypatch.setattr(Tensor, "new_empty", change)
    opened()
    assert torch.equal(direct(x, *group), expected)
    del memory


@pytest.mark.usefixtures("two_threads", "no_registered_op")
def test_concurrent_callers_get_correct_results() -> None:
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
def test_calls_do_not_leak_memory_or_references(unusual: bool) -> None:
    x, group = operands()
    arguments = UNUSUAL["bias of another length"](x, *group) if unusual else (x, *group)

    def resident_bytes(calls: int) -> int:
        for _ in range(calls):
            direct(*arguments)
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    tensors = [argument for argument in arguments if argument is not None]
    before, counts = resident_bytes(1000), [sys.getrefcount(tensor) for tensor in tensors]
    assert resident_bytes(100_000) - before < 2 << 20
    assert [sys.getrefcount(tensor) for tensor in tensors] == counts
