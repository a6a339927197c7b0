from __future__ import annotations

import pytest
import torch

from grasp_kernels import Factors, lowrank_glu
from tests.definitions import ACTIVATIONS, dense_linear, glu
from tests.numerics import assert_accurate
from tests.ops.inputs import BACKEND_NAMES, DEVICES, GRID, double, factors, normal, require, seeded, tokens
from tests.pairwise import Case, label, pairwise

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("backend", BACKEND_NAMES),
]


@pytest.mark.parametrize(
    "case",
    pairwise(**GRID, up_rank=(8, 5, 40), s=(True, False), bias=(True, False), activation=tuple(ACTIVATIONS)),
    ids=label,
)
def test_matches_float64(backend: str, device: str, case: Case) -> None:
    generator = seeded()
    options = {"dtype": case["dtype"], "device": device, "layout": case["layout"]}
    x = tokens(case["rows"], case["K"], case["ndim"], generator, **options)
    require(backend, "lowrank_glu", x, max(case["rank"], case["up_rank"]))
    gate = factors(case["N"], case["K"], case["rank"], generator, s=case["s"], bias=case["bias"], **options)
    up = factors(case["N"], case["K"], case["up_rank"], generator, s=not case["s"], bias=case["bias"], **options)
    y = lowrank_glu(x, gate, up, activation=case["activation"], backend=backend)
    plain, exact = glu(x, gate, up, case["activation"]), glu(x.double(), double(gate), double(up), case["activation"])
    assert_accurate("linear", case["dtype"], y, plain, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("rows", [2, 70])
def test_wide_inputs_and_outputs_span_several_tiles(backend: str, device: str, rows: int, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((rows, 300), generator, dtype=dtype, device=device)
    require(backend, "lowrank_glu", x, 40)
    gate, up = (factors(300, 300, 40, generator, s=False, bias=True, dtype=dtype, device=device) for _ in range(2))
    exact = glu(x.double(), double(gate), double(up), "silu")
    assert_accurate("linear", dtype, lowrank_glu(x, gate, up, backend=backend), glu(x, gate, up, "silu"), exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_float64(backend: str, device: str, activation: str) -> None:
    generator = seeded()
    x = normal((7, 63), generator, dtype=torch.float32, device=device)
    require(backend, "lowrank_glu", x, 8)
    gate = factors(48, 63, 5, generator, s=True, bias=True, dtype=torch.float32, device=device)
    up = factors(48, 63, 8, generator, s=False, bias=False, dtype=torch.float32, device=device)
    leaves = [tensor.detach().requires_grad_() for tensor in (x, *gate, *up) if tensor is not None]
    exact_leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]

    lowrank_glu(
        leaves[0], Factors(*leaves[1:5]), Factors(leaves[5], None, leaves[6]), activation=activation, backend=backend
    ).sin().sum().backward()
    x, *flat = exact_leaves
    gate_y, up_y = dense_linear(x, Factors(*flat[:4])), dense_linear(x, Factors(flat[4], None, flat[5]))
    (ACTIVATIONS[activation](gate_y) * up_y).sin().sum().backward()

    for leaf, exact in zip(leaves, exact_leaves, strict=True):
        assert leaf.grad is not None
        assert exact.grad is not None
        assert_accurate("linear", torch.float32, leaf.grad, exact.grad.float(), exact.grad)
