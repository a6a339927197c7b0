from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from grasp_kernels import Factors, lowrank_glu, lowrank_linear, lowrank_linear_grouped, singular_value_grad

x, U, Vh = torch.zeros(3, 8), torch.zeros(6, 2), torch.zeros(2, 8)
s, bias, grad_y = torch.ones(2), torch.zeros(6), torch.zeros(3, 6)
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
    "one bound": ({"cu_seqlens": torch.tensor([0])}, r"cu_seqlens .*\(1,\)"),
    "bounds in floating point": ({"cu_seqlens": torch.tensor([0.0, 3.0])}, r"int32 or int64 .* torch\.float32"),
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
