from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from grasp_kernels import (
    Dense,
    Factors,
    explain,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    pack_factors,
    singular_value_grad,
)
from grasp_kernels.checks import check_bounds

x, U, Vh = torch.zeros(3, 8), torch.zeros(6, 2), torch.zeros(2, 8)
s, bias, grad_y = torch.ones(2), torch.zeros(6), torch.zeros(3, 6)
order = torch.arange(8, dtype=torch.int32)  # of factors whose U is (6, 2)
meta = torch.device("meta")


def linear(*, backend: str = "auto", **changes: Any) -> Any:
    """``lowrank_linear`` of arguments that agree, except for ``changes``."""
    return lowrank_linear(**{"x": x, "U": U, "s": s, "Vh": Vh, "bias": bias, **changes}, backend=backend)


def gradient(**changes: Any) -> Any:
    """``singular_value_grad`` of arguments that agree, except for ``changes``."""
    return singular_value_grad(**{"x": x, "grad_y": grad_y, "U": U, "Vh": Vh, **changes})


FACTORS: dict[str, tuple[dict[str, Any], str]] = {
    "x without dimensions": ({"x": torch.tensor(1.0)}, r"expected x \(\.\.\., K\).*got x \(\)"),
    "x of another width": ({"x": torch.zeros(3, 9)}, r"got x \(3, 9\), U \(6, 2\), Vh \(2, 8\)"),
    "U of one dimension": ({"U": torch.zeros(6)}, r"got x \(3, 8\), U \(6,\)"),
    "Vh of three dimensions": ({"Vh": torch.zeros(1, 2, 8)}, r"Vh \(1, 2, 8\)"),
    "factors of different ranks": ({"Vh": torch.zeros(3, 8)}, r"U \(6, 2\), Vh \(3, 8\)"),
    "rank 0": ({"U": torch.zeros(6, 0), "Vh": torch.zeros(0, 8), "s": None}, r"U \(6, 0\)"),
    "no outputs": ({"U": torch.zeros(0, 2), "bias": None}, r"U \(0, 2\)"),
    "no inputs": ({"x": torch.zeros(3, 0), "Vh": torch.zeros(2, 0)}, r"Vh \(2, 0\)"),
    "s of another rank": ({"s": torch.ones(3)}, r"s .*\(2,\).*\(3,\)"),
    "s as a matrix": ({"s": torch.eye(2)}, r"s .*\(2,\).*\(2, 2\)"),
    "bias of another width": ({"bias": torch.zeros(8)}, r"bias .*\(6,\).*\(8,\)"),
    "integers": ({"x": x.long()}, r"x .*torch\.float32, .*torch\.int64"),
    "U of another dtype": ({"U": U.half()}, r"U .*torch\.float32.*torch\.float16"),
    "Vh of another dtype": ({"Vh": Vh.double()}, r"Vh .*torch\.float64"),
    "bias of another dtype": ({"bias": bias.bfloat16()}, r"bias .*torch\.bfloat16"),
    "s of another dtype": ({"s": s.half()}, r"s .*torch\.float32.*torch\.float16"),
    "U elsewhere": ({"U": U.to(meta)}, r"U .*cpu.*meta"),
    "s elsewhere": ({"s": s.to(meta)}, r"s .*cpu.*meta"),
    "Vh elsewhere": ({"Vh": Vh.to(meta)}, r"Vh .*cpu.*meta"),
    "an order and an s": ({"order": order}, r"no s, got s \(2,\)"),
    "order of another length": ({"order": order[:6], "s": None}, r"order .*\(8,\).*\(6,\)"),
    "order of another dtype": ({"order": order.long(), "s": None, "bias": None}, r"order .*int32.*int64"),
    "order elsewhere": ({"order": order.to(meta), "s": None, "bias": None}, r"order .*cpu.*meta"),
    "bias of the width of U": ({"order": order, "s": None}, r"bias .*\(8,\).*\(6,\)"),
    "bias elsewhere": ({"bias": bias.to(meta)}, r"bias .*cpu.*meta"),
}
GRADIENT: dict[str, tuple[dict[str, Any], str]] = {
    "grad_y of another width": ({"grad_y": torch.zeros(3, 8)}, r"grad_y .*\(3, 6\).*\(3, 8\)"),
    "grad_y of another length": ({"grad_y": torch.zeros(4, 6)}, r"grad_y .*\(3, 6\).*\(4, 6\)"),
    "grad_y of another dtype": ({"grad_y": grad_y.half()}, r"grad_y .*torch\.float32.*torch\.float16"),
    "grad_y elsewhere": ({"grad_y": grad_y.to(meta)}, r"grad_y .*cpu.*meta"),
    "factors of another rank": ({"U": torch.zeros(6, 3)}, r"U \(6, 3\), Vh \(2, 8\)"),
    "an unknown moment": ({"second_moment": "batch"}, "second_moment .*'token' or 'sample'.*'batch'"),
    "the moment 'none'": ({"second_moment": "none"}, "second_moment .*'token' or 'sample'.*'none'"),
    "mask of numbers": ({"mask": torch.ones(3)}, r"mask .*bool \(3,\).*torch\.float32"),
    "mask of another length": ({"mask": torch.ones(4, dtype=torch.bool)}, r"mask .*bool \(3,\).*\(4,\)"),
    "bounds as a matrix": ({"cu_seqlens": torch.tensor([[0, 3]])}, r"cu_seqlens .*\(B \+ 1,\).*\(1, 2\)"),
    "one bound": ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens .*3 tokens.*\[0\]"),
    "bounds in floating point": ({"cu_seqlens": torch.tensor([0.0, 3.0])}, r"int32 or int64.* torch\.float32"),
    "bounds elsewhere": ({"cu_seqlens": torch.zeros(2, dtype=torch.int64, device=meta)}, "cu_seqlens .*cpu.*meta"),
    "bounds from 1": ({"cu_seqlens": torch.tensor([1, 3])}, r"cu_seqlens .*3 tokens.*\[1, 3\]"),
    "bounds that end early": ({"cu_seqlens": torch.tensor([0, 2])}, r"cu_seqlens .*3 tokens.*\[0, 2\]"),
    "bounds that fall": ({"cu_seqlens": torch.tensor([0, 2, 1, 3])}, r"cu_seqlens .*\[0, 2, 1, 3\]"),
}


@pytest.mark.parametrize(("changes", "message"), FACTORS.values(), ids=FACTORS)
def test_factors_that_do_not_apply_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        linear(**changes)


@pytest.mark.parametrize(("changes", "message"), GRADIENT.values(), ids=GRADIENT)
def test_gradient_inputs_that_do_not_agree_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gradient(**changes)


def test_arguments_that_agree_are_accepted() -> None:
    linear()
    linear(s=None, bias=None)
    linear(x=x.half(), U=U.half(), Vh=Vh.half(), bias=bias.half())  # s in fp32
    linear(x=x.half(), U=U.half(), Vh=Vh.half(), bias=bias.half(), s=s.half())
    gradient(cu_seqlens=torch.tensor([0, 0, 3], dtype=torch.int32), mask=torch.ones(3, dtype=torch.bool))


good, bad = Factors(U, s, Vh, bias), Factors(U, s, torch.zeros(2, 9), bias)
OTHERS: dict[str, tuple[Callable[[], object], str]] = {
    "an empty group": (lambda: lowrank_linear_grouped(x, []), "at least one Factors"),
    "one bad group of two": (lambda: lowrank_linear_grouped(x, [good, bad]), r"Vh \(2, 9\)"),
    "a dense member of integers": (
        lambda: lowrank_linear_merged(x.int(), [Dense(torch.zeros(6, 8, dtype=torch.int32))]),
        "x must be one of .*float64, got torch.int32",
    ),
    "a bad gate": (lambda: lowrank_glu(x, bad, good), r"Vh \(2, 9\)"),
    "a bad up": (lambda: lowrank_glu(x, good, bad), r"Vh \(2, 9\)"),
    "different widths": (
        lambda: lowrank_glu(x, good, Factors(torch.zeros(5, 2), None, Vh)),
        "gate and up .*6 and 5",
    ),
    "an unknown activation": (
        lambda: lowrank_glu(x, good, good, activation="tanh"),
        "'tanh'.*silu, gelu, gelu_tanh, relu",
    ),
}


@pytest.mark.parametrize(("call", "message"), OTHERS.values(), ids=OTHERS)
def test_groups_that_do_not_agree_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def wrong_values() -> dict[str, Any]:
    """Values that no argument takes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # prototypes and deprecations of PyTorch
        return {
            "array": np.zeros((3, 8)),
            "list": [[1.0]],
            "integer": 3,
            "tuple": (x,),
            "COO": x.to_sparse(),
            "CSR": x.to_sparse_csr(),
            "MKL-DNN": x.to_mkldnn(),
            "quantized": torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
            "nested": torch.nested.nested_tensor([x, x]),
            "jagged": torch.nested.nested_tensor([x, x], layout=torch.jagged),
            "complex": x.to(torch.complex64),
            "bool": x.bool(),
            "int8": x.to(torch.int8),
            "float8": x.to(torch.float8_e4m3fn),
        }


group = Factors(U, s, Vh, bias)
# A call with a wrong value in each place in turn.
PLACES: dict[str, Callable[[Any], object]] = {
    **{name: functools.partial(lambda name, value: linear(**{name: value}), name) for name in ("x", *Factors._fields)},
    "backend": lambda value: linear(backend=value),
    "factors": lambda value: lowrank_linear_grouped(x, value),
    "a group": lambda value: lowrank_linear_grouped(x, [group, value]),
    "a group's U": lambda value: lowrank_linear_grouped(x, [group, group._replace(U=value)]),
    "a group's s": lambda value: lowrank_linear_grouped(x, [group, group._replace(s=value)]),
    "x of groups": lambda value: lowrank_linear_grouped(value, [group]),
    "gate": lambda value: lowrank_glu(x, value, group),
    "up": lambda value: lowrank_glu(x, group, value),
    "the gate's bias": lambda value: lowrank_glu(x, group._replace(bias=value), group),
    "activation": lambda value: lowrank_glu(x, group, group, activation=value),
    "second_moment": lambda value: gradient(second_moment=value),
    "per_sample": lambda value: gradient(per_sample=value),
    "cu_seqlens": lambda value: gradient(cu_seqlens=value),
    "mask": lambda value: gradient(mask=value),
    "grad_y": lambda value: gradient(grad_y=value),
    "x of the gradient": lambda value: gradient(x=value),
    "pack_factors": pack_factors,
    "a packed group": lambda value: pack_factors([value]),
    "a packed U": lambda value: pack_factors([group._replace(U=value)]),
    "a packed s": lambda value: pack_factors([group._replace(s=value)]),
    "a packed Vh": lambda value: pack_factors([group._replace(Vh=value)]),
    "a packed bias": lambda value: pack_factors([group._replace(bias=value)]),
    "op": lambda value: explain(value, rows=1, rank=1),
    "rows": lambda value: explain("lowrank_glu", rows=str(value), rank=1),  # type: ignore[arg-type]
    "rank": lambda value: explain("lowrank_glu", rows=1, rank=str(value)),  # type: ignore[arg-type]
    "dtype": lambda value: explain("lowrank_glu", rows=1, rank=1, dtype=value),
    "device": lambda value: explain("lowrank_glu", rows=1, rank=1, device=value),
    "pivoted": lambda value: explain("lowrank_glu", rows=1, rank=1, pivoted=value),
    "weights": lambda value: explain("lowrank_glu", rows=1, rank=1, weights=value),
}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("call", PLACES.values(), ids=PLACES)
def test_wrong_types_and_layouts_are_refused(call: Callable[[Any], object], autocast: bool) -> None:
    for name, value in wrong_values().items():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises((TypeError, ValueError)) as caught:
            call(value)
        message = str(caught.value)
        assert "got" in message or "unknown" in message, name
        assert "\n" not in message, name


def test_the_message_has_the_type_or_the_layout() -> None:
    with pytest.raises(TypeError, match="U must be a tensor, got ndarray"):
        linear(U=np.zeros(2))
    with pytest.raises(ValueError, match=r"U must be a dense tensor, got the layout torch\.sparse"):
        linear(U=U.to_sparse())


def test_explain_refuses_calls_that_no_op_takes() -> None:
    for changes in ({"dtype": torch.int8}, {"device": "abacus"}, {"rows": -1}, {"rank": 0}, {"groups": 0}):
        with pytest.raises(ValueError, match=r"got|unknown"):
            explain("lowrank_linear", **{"rows": 1, "rank": 1, **changes})  # type: ignore[arg-type]


def test_any_tuple_of_factors_is_a_group_on_every_path() -> None:
    for backend in ("auto", "reference"):
        assert lowrank_linear_grouped(x, [(U, s, Vh, bias)], backend=backend)[0].shape == (3, 6)  # type: ignore[list-item]
        pivoted = (U, None, Vh, None, order)
        assert lowrank_linear_grouped(x, [pivoted], backend=backend)[0].shape == (3, 8)  # type: ignore[list-item]


class OnGpu(Tensor):
    """A tensor that says it is on a GPU, and counts how often its values are read on the host."""

    is_cuda = property(lambda _: True)  # type: ignore[assignment]
    reads = 0

    def tolist(self) -> list[int]:
        type(self).reads += 1
        return super().tolist()


def test_bounds_on_a_gpu_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(OnGpu, "reads", 0)
    cu_seqlens = torch.tensor([0, 2, 3]).as_subclass(OnGpu)
    for _ in range(3):
        check_bounds(cu_seqlens, 3)
    assert OnGpu.reads == 1
    for _ in range(2):
        with pytest.raises(ValueError, match=r"from 0 to the 4 tokens, got \[0, 2, 3\]"):
            check_bounds(cu_seqlens, 4)
    cu_seqlens[1] = 5
    with pytest.raises(ValueError, match=r"got \[0, 5, 3\]"):
        check_bounds(cu_seqlens, 3)
    assert OnGpu.reads == 2


def test_elsewhere_than_on_a_cpu_a_dense_weight_is_quantised() -> None:
    x, others = torch.zeros(3, 8, device=meta), torch.zeros(0, 6, device=meta)
    order, scales = torch.arange(6, device=meta, dtype=torch.int32), torch.ones(6, 1, device=meta)
    weight = torch.zeros(6, 8, device=meta)
    assert lowrank_linear(x, others, None, weight.to(torch.int8), None, order, None, scales).shape == (3, 6)
    with pytest.raises(ValueError, match="a dense floating weight in Vh, is for the CPU, got tensors on meta"):
        lowrank_linear(x, others, None, weight, None, order)
