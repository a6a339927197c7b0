from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from grasp_kernels import (
    Dense,
    Factors,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    singular_value_grad,
)
from tests.definitions import linear
from tests.ops.inputs import DTYPES, factors, normal, seeded

K, N, R = 24, 16, 4


Arguments = tuple[Tensor, Factors, Factors, Tensor]


def arguments(dtype: torch.dtype = torch.float32, requires_grad: bool = False) -> Arguments:
    """x (2, 3, K), two groups of factors of unequal rank, and grad_y (2, 3, N)."""
    generator = seeded()
    x = normal((2, 3, K), generator, dtype=dtype)
    gate = factors(N, K, R, generator, s=True, bias=True, dtype=dtype)
    up = factors(N, K, R + 1, generator, s=False, bias=False, dtype=dtype)
    grad_y = normal((2, 3, N), generator, dtype=dtype)
    for tensor in (x, *gate, *up, grad_y):
        if tensor is not None:
            tensor.requires_grad_(requires_grad)
    return x, gate, up, grad_y


CALLS: dict[str, Callable[[Tensor, Factors, Factors, Tensor], Any]] = {
    "lowrank_linear": lambda x, gate, up, grad_y: lowrank_linear(x, *gate),
    "lowrank_linear_grouped": lambda x, gate, up, grad_y: lowrank_linear_grouped(x, [gate, up]),
    "lowrank_linear_merged": lambda x, gate, up, grad_y: lowrank_linear_merged(x, [gate, Dense(up.Vh), up]),
    "lowrank_glu": lambda x, gate, up, grad_y: lowrank_glu(x, gate, up),
    "singular_value_grad": lambda x, gate, up, grad_y: tuple(
        singular_value_grad(x, grad_y, gate.U, gate.Vh, per_sample=True, second_moment="token")
    ),
}
LOW_RANK = [op for op in CALLS if op.startswith("lowrank")]


def flat(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def assert_same(got: Any, expected: Any) -> None:
    """Equal bit for bit, because the same backend runs all of them."""
    for a, b in zip(flat(got), flat(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


class Seen(TorchDispatchMode):
    """Records the names of the ops that reach the dispatcher."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


# --- registration -----------------------------------------------------------------------------------------------------


def op_arguments(op: str, dtype: torch.dtype, requires_grad: bool) -> tuple[Any, ...]:
    x, gate, up, grad_y = arguments(dtype, requires_grad)
    columns = [[gate.U, up.U], [gate.s], [gate.Vh, up.Vh], [gate.bias], *[[]] * 3]
    present = [*[True] * 4, *[False] * 3, True, False, True, *[False] * 4]
    merged = [[gate.U, up.Vh, up.U], *columns[1:]]
    merged_present = [*present[:7], True, *[False] * 6, *present[7:]]
    cu_seqlens = torch.tensor([0, 2, 2, 6])
    return {
        "lowrank_linear": (x, *gate, "auto"),
        "lowrank_linear_grouped": (x, *columns, present, "auto"),
        "lowrank_linear_merged": (x, *merged, merged_present, "auto"),
        "lowrank_glu": (x, *gate, *up, "silu", "auto"),
        "singular_value_grad": (x, grad_y, gate.U, gate.Vh, cu_seqlens, True, "sample", None, "auto"),
    }[op]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op: str, requires_grad: bool) -> None:
    # fp64, because opcheck compares eager gradients with those of a compiled graph, which rounds at other places.
    torch.library.opcheck(getattr(torch.ops.grasp, op).default, op_arguments(op, torch.float64, requires_grad))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_fake_tensors_have_the_shapes_dtypes_and_strides_of_real_ones(op: str, dtype: torch.dtype) -> None:
    real = flat(CALLS[op](*arguments(dtype)))
    with FakeTensorMode() as mode:
        x, gate, up, grad_y = arguments(dtype)
        fake = flat(CALLS[op](mode.from_tensor(x), gate, up, grad_y))
    described = [[(y.shape, y.dtype, y.stride()) for y in result] for result in (real, fake)]
    assert described[0] == described[1]


@pytest.mark.parametrize("op", CALLS)
def test_meta_tensors(op: str) -> None:
    x, gate, up, grad_y = arguments()
    meta = [Factors(*(None if tensor is None else tensor.to("meta") for tensor in group)) for group in (gate, up)]
    results = flat(CALLS[op](x.to("meta"), *meta, grad_y.to("meta")))
    assert [y.shape for y in results] == [y.shape for y in flat(CALLS[op](x, gate, up, grad_y))]
    assert {y.device.type for y in results} == {"meta"}


# --- compile, export, transforms --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", CALLS)
def test_compiles_into_one_graph(op: str, dynamic: bool) -> None:
    torch.compiler.reset()
    compiled = torch.compile(CALLS[op], fullgraph=True, dynamic=dynamic, backend="aot_eager")
    x, gate, up, grad_y = arguments()
    assert_same(compiled(x, gate, up, grad_y), CALLS[op](x, gate, up, grad_y))
    if dynamic:
        with torch.compiler.set_stance("fail_on_recompile"):
            longer, grad = torch.cat([x, x], 1), torch.cat([grad_y, grad_y], 1)
            assert_same(compiled(longer, gate, up, grad), CALLS[op](longer, gate, up, grad))


@pytest.mark.parametrize("op", CALLS)
def test_compiled_gradients_are_the_eager_ones(op: str) -> None:
    torch.compiler.reset()
    compiled = torch.compile(CALLS[op], fullgraph=True, backend="aot_eager")
    grads = []
    for run in (CALLS[op], compiled):
        x, gate, up, grad_y = arguments(torch.float64, requires_grad=True)
        torch.autograd.backward([y.sin().sum() for y in flat(run(x, gate, up, grad_y))])
        grads.append([tensor.grad for tensor in (x, *gate, *up, grad_y) if tensor is not None])
    for eager, other in zip(*grads, strict=True):
        assert (eager is None) == (other is None)
        if eager is not None:
            torch.testing.assert_close(other, eager, rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor_keeps_the_op_opaque() -> None:
    torch.compiler.reset()
    x, gate, _, _ = arguments()
    run = torch.compile(lambda x: lowrank_linear(x * 2, *gate).relu(), fullgraph=True)
    y, (code,) = run_and_get_code(run, x)
    assert_same(y, lowrank_linear(x * 2, *gate).relu())
    assert "torch.ops.grasp.lowrank_linear.default" in code


TRACERS = {
    "make_fx": lambda f, x: make_fx(f)(x),
    "make_fx before autograd": lambda f, x: make_fx(f, pre_dispatch=True)(x),
    "make_fx with fake tensors": lambda f, x: make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x),
    "export": lambda f, x: torch.export.export(module(f), (x,)).graph_module,
    "non-strict export": lambda f, x: torch.export.export(module(f), (x,), strict=False).graph_module,
}


def module(f: Callable[[Tensor], Tensor]) -> nn.Module:
    class Wrapped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return f(x)

    return Wrapped()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("trace", TRACERS.values(), ids=TRACERS)
def test_tracers_see_the_registered_op(trace: Callable[..., Any], grad: bool) -> None:
    x, gate, _, _ = arguments()
    with torch.set_grad_enabled(grad):
        graph = trace(lambda x: lowrank_linear(x, *gate), x)
    assert "grasp.lowrank_linear.default" in {str(node.target) for node in graph.graph.nodes}


@pytest.mark.filterwarnings("ignore:.*torch.jit", "ignore::torch.jit.TracerWarning")
def test_torchscript_traces_see_the_registered_op() -> None:
    x, gate, _, _ = arguments()
    assert "grasp::lowrank_linear" in str(torch.jit.trace(lambda x: lowrank_linear(x, *gate), x).graph)


@pytest.mark.parametrize("op", CALLS)
def test_dispatch_modes_see_the_registered_op(op: str) -> None:
    with Seen() as seen, torch.inference_mode():
        CALLS[op](*arguments())
    assert f"grasp.{op}.default" in seen.names


def test_function_modes_see_the_registered_op() -> None:
    called: list[str] = []

    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return func(*args, **(kwargs or {}))

    x, gate, _, _ = arguments()
    with Mode():
        lowrank_linear(x, *gate)
    assert "grasp.lowrank_linear.default" in called


def test_tensor_subclasses_see_the_registered_op() -> None:
    called: list[str] = []

    class Subclass(Tensor):
        @classmethod
        def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            called.append(str(func))
            return super().__torch_function__(func, types, args, kwargs)

    x, gate, _, _ = arguments()
    lowrank_linear(x.as_subclass(Subclass), *gate)
    assert "grasp.lowrank_linear.default" in called


@pytest.mark.filterwarnings("ignore:There is a performance drop because we have not yet implemented the batching rule")
def test_vmap_is_a_loop_over_the_op() -> None:
    x, gate, _, _ = arguments(torch.float64)
    got = torch.func.vmap(lambda x: lowrank_linear(x, *gate))(x)
    torch.testing.assert_close(got, linear(x, gate), rtol=0, atol=1e-12)


@pytest.mark.parametrize("op", CALLS)
def test_plain_calls_do_not_reach_the_dispatcher(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, gate, up, grad_y = arguments()
    expected = CALLS[op](x, gate, up, grad_y)

    def fail(*_: object) -> None:
        raise AssertionError("the dispatcher was asked")

    for name in CALLS:
        monkeypatch.setattr(getattr(torch.ops.grasp, name), "default", fail)
    parameters = [Factors(*(None if t is None else nn.Parameter(t) for t in group)) for group in (gate, up)]
    with torch.no_grad():
        assert_same(CALLS[op](x, *parameters, grad_y), expected)
    with torch.inference_mode():
        assert_same(CALLS[op](x, *parameters, grad_y), expected)
    with pytest.raises(AssertionError, match="the dispatcher was asked"):
        CALLS[op](x, *parameters, grad_y)


def test_negated_views_are_resolved() -> None:
    x, gate, _, _ = arguments()
    view = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert view.is_neg()
    assert torch.equal(view, x)
    assert_same(lowrank_linear(view, *gate), lowrank_linear(x, *gate))


# --- autocast ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", LOW_RANK)
def test_autocast_casts_as_for_a_linear(op: str, dtype: torch.dtype) -> None:
    x, gate, up, grad_y = arguments()
    cast = [Factors(*(t if t is None or t is g.s else t.to(dtype) for t in g)) for g in (gate, up)]
    with torch.autocast("cpu", dtype):
        got = CALLS[op](x, gate, up, grad_y)
        assert flat(got)[0].dtype == nn.functional.linear(x, gate.Vh).dtype == dtype
    assert_same(got, CALLS[op](x.to(dtype), *cast, grad_y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", LOW_RANK)
def test_autocast_takes_singular_values_of_the_other_16_bits(op: str, dtype: torch.dtype) -> None:
    other = torch.float16 if dtype == torch.bfloat16 else torch.bfloat16
    x, gate, up, grad_y = arguments()
    narrow = [g._replace(s=None if g.s is None else g.s.to(other)) for g in (gate, up)]
    wide = [g._replace(s=None if g.s is None else g.s.float()) for g in narrow]
    with torch.autocast("cpu", dtype):
        assert_same(CALLS[op](x, *narrow, grad_y), CALLS[op](x, *wide, grad_y))


def test_compiled_calls_follow_autocast() -> None:
    torch.compiler.reset()
    x, gate, up, grad_y = arguments()
    compiled = torch.compile(lambda: CALLS["lowrank_glu"](x, gate, up, grad_y), fullgraph=True, backend="aot_eager")
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            assert_same(compiled(), CALLS["lowrank_glu"](x, gate, up, grad_y))


@pytest.mark.parametrize("op", CALLS)
def test_registered_ops_keep_their_dtype_under_autocast(op: str) -> None:
    arguments = op_arguments(op, torch.float32, requires_grad=False)
    arguments = (*arguments[:-1], "reference")
    expected = getattr(torch.ops.grasp, op)(*arguments)
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(getattr(torch.ops.grasp, op)(*arguments), expected)


def test_autocast_leaves_fp64_alone() -> None:
    x, gate, _, _ = arguments(torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        assert lowrank_linear(x, *gate).dtype == torch.float64


def test_gradients_under_autocast_have_the_parameters_dtype() -> None:
    x, gate, _, _ = arguments(requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y = lowrank_linear(x, *gate)
    y.sum().backward()
    for tensor in (x, *gate[:4]):
        assert tensor is not None
        assert tensor.grad is not None
        assert tensor.grad.dtype == torch.float32


# --- shapes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("leading", [(), (1,), (5,), (2, 3), (2, 1, 3), (0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("op", LOW_RANK)
def test_leading_dimensions_are_kept(op: str, leading: tuple[int, ...]) -> None:
    _, gate, up, grad_y = arguments(torch.float64)
    x = normal((*leading, K), seeded(1))
    rows = CALLS[op](x.reshape(math.prod(leading), K), gate, up, grad_y)
    for y, expected in zip(flat(CALLS[op](x, gate, up, grad_y)), flat(rows), strict=True):
        torch.testing.assert_close(y, expected.view(*leading, expected.shape[-1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("leading", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("op", CALLS)
def test_no_rows_give_zero_gradients(op: str, leading: tuple[int, ...]) -> None:
    _, gate, up, _ = arguments(requires_grad=True)
    x, grad_y = torch.zeros(*leading, K, requires_grad=True), torch.zeros(*leading, N)
    torch.autograd.backward([y.sum() for y in flat(CALLS[op](x, gate, up, grad_y))])
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert gate.U.grad is not None
    assert not gate.U.grad.any()


def test_samples_are_the_rows_of_the_leading_dimensions_but_the_last() -> None:
    x, gate, _, grad_y = arguments()
    got = singular_value_grad(x, grad_y, gate.U, gate.Vh, per_sample=True).first
    each = [singular_value_grad(x[b], grad_y[b], gate.U, gate.Vh).first for b in range(2)]
    torch.testing.assert_close(got, torch.stack(each))
    four = singular_value_grad(x[None, :, :, None], grad_y[None, :, :, None], gate.U, gate.Vh, per_sample=True).first
    assert four.shape == (6, R)
    one = singular_value_grad(x[0], grad_y[0], gate.U, gate.Vh, per_sample=True).first
    torch.testing.assert_close(one, each[0][None])


@pytest.mark.parametrize("name", ["s", "bias"])
def test_an_absent_tensor_equals_its_neutral_element(name: str) -> None:
    x, gate, _, _ = arguments(torch.float64)
    identity = {"s": torch.ones(R), "bias": torch.zeros(N, dtype=torch.float64)}[name]
    absent, present = gate._replace(**{name: None}), gate._replace(**{name: identity})
    torch.testing.assert_close(lowrank_linear(x, *absent), lowrank_linear(x, *present), rtol=0, atol=1e-12)


def test_forward_mode_is_refused_rather_than_wrong() -> None:
    x, U, Vh = torch.randn(3, 5), torch.randn(4, 2), torch.randn(2, 5)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda x: lowrank_linear(x, U, None, Vh), (x,), (torch.ones_like(x),))


@pytest.mark.parametrize("op", CALLS)
def test_gradients_of_torch_func_are_refused_in_plain_words(op: str) -> None:
    x, gate, up, grad_y = arguments(torch.float64)

    def total(x: Tensor) -> Tensor:
        outputs = CALLS[op](x, gate, up, grad_y)
        return sum(output.sum() for output in ([outputs] if isinstance(outputs, Tensor) else outputs))

    func = torch.func
    for transformed in (
        func.grad(total),
        func.jacrev(total),
        func.hessian(total),
        lambda x: func.vmap(func.grad(total))(x[None]),
        func.grad(lambda x: func.vmap(total)(x[None]).sum()),
    ):
        with pytest.raises(NotImplementedError, match=r"torch\.func takes no gradients|torch\.func\.vmap of"):
            transformed(x)
    assert func.grad(lambda y: total(x) + y.sum())(torch.ones(2)).tolist() == [1, 1]  # none in the op's arguments


@pytest.mark.parametrize("op", [lowrank_linear_grouped, lowrank_linear_merged])
def test_vmap_of_several_linears_is_refused_in_plain_words(op: Callable[..., Any]) -> None:
    x, gate, up, _ = arguments()
    with pytest.raises(NotImplementedError, match=rf"torch\.func\.vmap of {op.__name__} is not supported"):
        torch.func.vmap(lambda x: op(x, [gate, up]))(x)


def test_the_gradient_of_singular_values_takes_the_mixed_dtypes_of_autocast() -> None:
    x, grad_y, U, Vh = torch.randn(3, 5), torch.randn(3, 4), torch.randn(4, 2), torch.randn(2, 5)
    expected = singular_value_grad(x, grad_y.bfloat16().float(), U, Vh).first
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(singular_value_grad(x, grad_y.bfloat16(), U, Vh).first, expected)
