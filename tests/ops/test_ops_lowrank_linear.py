from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from grasp_kernels import Dense, Factors, lowrank_linear, lowrank_linear_grouped, lowrank_linear_merged
from tests.definitions import dense_linear, linear
from tests.numerics import assert_accurate
from tests.ops.inputs import (
    BACKEND_NAMES,
    DEVICES,
    GRID,
    double,
    factors,
    normal,
    require,
    seeded,
    tokens,
)
from tests.ops.linears import check_linear
from tests.pairwise import Case, label, pairwise

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.parametrize("device", DEVICES),
    pytest.mark.parametrize("backend", BACKEND_NAMES),
]
# A small q, k, v of grouped-query attention: unequal ranks and widths, not all with s or a bias.
GROUPS = (
    {"N": 128, "rank": 32, "s": True, "bias": True},
    {"N": 16, "rank": 5, "s": False, "bias": True},
    {"N": 63, "rank": 1, "s": True, "bias": False},
)


def grouped(K: int, generator: torch.Generator, count: int = 3, **options: object) -> list[Factors]:
    return [factors(K=K, generator=generator, **group, **options) for group in GROUPS[:count]]  # type: ignore[arg-type]


def check(y: Tensor, x: Tensor, group: Factors) -> None:
    assert y.is_contiguous()
    check_linear(y, x, group)


@pytest.mark.parametrize("case", pairwise(**GRID, s=(True, False), bias=(True, False)), ids=label)
def test_single_matches_float64(backend: str, device: str, case: Case) -> None:
    generator = seeded()
    options = {"dtype": case["dtype"], "device": device, "layout": case["layout"]}
    x = tokens(case["rows"], case["K"], case["ndim"], generator, **options)
    require(backend, "lowrank_linear", x, case["rank"])
    group = factors(case["N"], case["K"], case["rank"], generator, s=case["s"], bias=case["bias"], **options)
    check(lowrank_linear(x, *group, backend=backend), x, group)


@pytest.mark.parametrize(
    "case",
    pairwise(**{axis: GRID[axis] for axis in ("rows", "K", "dtype", "layout", "ndim")}, groups=(3, 2, 1)),
    ids=label,
)
def test_grouped_matches_float64(backend: str, device: str, case: Case) -> None:
    generator = seeded()
    options = {"dtype": case["dtype"], "device": device, "layout": case["layout"]}
    x = tokens(case["rows"], case["K"], case["ndim"], generator, **options)
    require(backend, "lowrank_linear_grouped", x, 32)
    groups = grouped(case["K"], generator, case["groups"], **options)
    outputs = lowrank_linear_grouped(x, groups, backend=backend)
    assert isinstance(outputs, tuple)
    assert len(outputs) == case["groups"]
    for y, group in zip(outputs, groups, strict=True):
        check(y, x, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 63), (2, 5, 64), (70, 128)], ids=str)
@pytest.mark.parametrize("biased", [True, False], ids=["biased", "plain"])
def test_merged_outputs_lie_side_by_side(
    backend: str, device: str, shape: tuple[int, ...], dtype: torch.dtype, biased: bool
) -> None:
    generator = seeded()
    x = normal(shape, generator, dtype=dtype, device=device)
    require(backend, "lowrank_linear_grouped", x, 32)
    groups = grouped(shape[-1], generator, dtype=dtype, device=device)
    if not biased:
        groups = [group._replace(bias=None) for group in groups]
    dense = Dense(groups[0].Vh, groups[0].Vh[:, 0] if biased else None)
    first, *others = groups
    merged = lowrank_linear_merged(x, [first, dense, *others], backend=backend)
    assert merged.is_contiguous()
    widths = [group.out_features for group in (first, dense, *others)]
    first_y, dense_y, *ys = (y.contiguous() for y in merged.split(widths, dim=-1))
    for y, group in zip((first_y, *ys), groups, strict=True):
        check(y, x, group)
    exact = F.linear(x.double(), *(None if tensor is None else tensor.double() for tensor in dense))
    assert_accurate("linear", dtype, dense_y, F.linear(x, *dense), exact)


def test_fp64_keeps_its_precision(backend: str, device: str) -> None:
    generator = seeded()
    x = normal((7, 63), generator, device=device)
    require(backend, "lowrank_linear_grouped", x, 32)
    groups = grouped(63, generator, device=device)
    for y, group in zip(lowrank_linear_grouped(x, groups, backend=backend), groups, strict=True):
        check(y, x, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", [1, 7, 70])
def test_wide_inputs_and_outputs_span_several_tiles(backend: str, device: str, rows: int, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((rows, 700), generator, dtype=dtype, device=device)
    require(backend, "lowrank_linear", x, 40)
    group = factors(520, 700, 40, generator, s=True, bias=True, dtype=dtype, device=device)
    check(lowrank_linear(x, *group, backend=backend), x, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("needed", ["all", "x", "s", "bias"])
def test_gradients_match_float64(backend: str, device: str, needed: str, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((2, 5, 63), generator, dtype=dtype, device=device)
    require(backend, "lowrank_linear", x, 5)
    group = factors(48, 63, 5, generator, s=True, bias=True, dtype=dtype, device=device)
    grad_y = normal((2, 5, 48), generator, dtype=dtype, device=device)
    names = ("x", *Factors._fields[:4])
    wanted = names if needed == "all" else (needed,)

    def gradients(function: object, *tensors: Tensor) -> dict[str, Tensor]:
        leaves = {
            name: tensor.detach().requires_grad_(name in wanted) for name, tensor in zip(names, tensors, strict=True)
        }
        function(leaves["x"], Factors(*list(leaves.values())[1:])).backward(grad_y.to(tensors[0].dtype))  # type: ignore[operator]
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    got = gradients(lambda x, group: lowrank_linear(x, *group, backend=backend), x, *group[:4])
    plain = gradients(linear, x, *group[:4])
    exact = gradients(dense_linear, x.double(), *double(group)[:4])
    assert tuple(got) == wanted
    for name in wanted:
        assert_accurate("linear", dtype, got[name], plain[name], exact[name])


def test_gradients_of_a_group_add_up_in_x(backend: str, device: str) -> None:
    generator = seeded()
    x = normal((7, 63), generator, dtype=torch.float32, device=device)
    require(backend, "lowrank_linear_grouped", x, 32)
    groups = grouped(63, generator, dtype=torch.float32, device=device)
    leaf, exact = x.requires_grad_(), x.detach().double().requires_grad_()
    got = lowrank_linear_grouped(leaf, groups, backend=backend)
    torch.autograd.backward([y.sin().sum() for y in got])
    torch.autograd.backward([dense_linear(exact, double(group)).sin().sum() for group in groups])
    assert leaf.grad is not None
    assert exact.grad is not None
    assert_accurate("linear", torch.float32, leaf.grad, exact.grad.float(), exact.grad)


def test_runs_agree_bit_for_bit(backend: str, device: str) -> None:
    generator = seeded()
    x = normal((5, 700), generator, dtype=torch.float32, device=device)
    require(backend, "lowrank_linear", x, 32)
    group = factors(128, 700, 32, generator, s=True, bias=True, dtype=torch.float32, device=device)
    first = lowrank_linear(x, *group, backend=backend)
    assert torch.equal(first, lowrank_linear(x, *group, backend=backend))


def test_inputs_are_not_modified(backend: str, device: str) -> None:
    generator = seeded()
    x = normal((2, 63), generator, dtype=torch.float32, device=device)
    require(backend, "lowrank_linear_grouped", x, 32)
    groups = grouped(63, generator, dtype=torch.float32, device=device)
    before = [tensor.clone() for tensor in (x, *(t for group in groups for t in group if t is not None))]
    lowrank_linear_grouped(x, groups, backend=backend)
    after = (x, *(t for group in groups for t in group if t is not None))
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
