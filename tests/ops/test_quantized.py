"""Quantised factors in every op: int8, int4 and fp8 values with scales along the rows."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from grasp_kernels import (
    Dense,
    Factors,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    pack_factors,
)
from grasp_kernels.dispatch import BACKENDS, OpCall, objection
from grasp_kernels.quantized import KINDS, dequantize, group_size, pack_int4, unpack_int4
from tests.definitions import dense_linear, glu
from tests.ops.inputs import double, normal, seeded
from tests.ops.linears import check_linear
from tests.pairwise import Case, label, pairwise

K, N, R = 70, 45, 37


def matrix(kind: str, rows: int, depth: int, groups: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor]:
    generator = seeded(seed)
    scales = torch.randn(rows, groups, generator=generator).bfloat16().to(dtype) / 16
    scales[0] = 0  # a row of zeros
    if kind == "fp8":
        return torch.randn(rows, depth, generator=generator).to(torch.float8_e4m3fn), scales
    highest = 127 if kind == "int8" else 7
    values = torch.randint(-highest - 1, highest + 1, (rows, depth), generator=generator)
    return values.to(torch.int8) if kind == "int8" else pack_int4(values), scales


def quantized(
    kind: str,
    dtype: torch.dtype,
    *,
    group: int | None = None,
    pivoted: bool = False,
    bias: bool = False,
    sizes: tuple[int, int, int] = (K, N, R),
) -> Factors:
    K, N, R = sizes
    rows = N - R if pivoted else N
    U, U_scales = matrix(kind, rows, R, 1 if group is None else -(-R // group), dtype, 1)
    Vh, Vh_scales = matrix(kind, R, K, 1 if group is None else -(-K // group), dtype, 2)
    order = None
    if pivoted:
        pivots, others = torch.randperm(N, generator=seeded(3)).split([R, N - R])
        order = torch.cat([pivots.sort().values, others.sort().values]).int()
    b = normal((N,), seeded(4), dtype=dtype) if bias else None
    return Factors(U, None, Vh, b, order, U_scales, Vh_scales)


def wide(group: Factors, in_features: int = K) -> Factors:
    """The same linear in float64, nothing rounded."""
    return double(group.dequantized(in_features, torch.float64))


def only(group: Factors, side: str, in_features: int = K) -> Factors:
    """Only ``side`` quantised, ``"U"`` or ``"Vh"``; ``"both"``: all as it is. The other one has the scales' dtype."""
    assert group.U_scales is not None
    floating = group.dequantized(in_features, group.U_scales.dtype)
    return {
        "both": group,
        "U": group._replace(Vh=floating.Vh, Vh_scales=None),
        "Vh": group._replace(U=floating.U, U_scales=None),
    }[side]


CASES = pairwise(
    kind=tuple(KINDS.values()),
    dtype=(torch.float32, torch.float16, torch.bfloat16, torch.float64),
    group=(None, 32, 64),
    pivoted=(False, True),
    bias=(False, True),
    rows=(1, 3, 9, 40, 70),
    backend=tuple(row.name for row in BACKENDS if "lowrank_linear" in row.functions),
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_backend_is_as_accurate_as_plain_pytorch(case: Case) -> None:
    row = next(row for row in BACKENDS if row.name == case["backend"])
    kinds = frozenset({case["kind"]})
    call = OpCall("lowrank_linear", torch.device("cpu"), case["dtype"], case["rows"], R, case["pivoted"], kinds)
    if (reason := objection(row, call)) is not None:
        pytest.skip(f"{row.name}: {reason}")
    options = {"group": case["group"], "pivoted": case["pivoted"], "bias": case["bias"]}
    group = quantized(case["kind"], case["dtype"], **options)
    x = normal((case["rows"], K), seeded(), dtype=case["dtype"])
    y = lowrank_linear(x, *group, backend=row.name)
    check_linear(y, x, group)


@pytest.mark.parametrize("kind", KINDS.values())
def test_groups_merged_outputs_and_gated_units_take_quantised_factors(kind: str) -> None:
    x, first = normal((2, 3, K), seeded()), quantized(kind, torch.float64, group=32)
    second = quantized(kind, torch.float64, pivoted=True, bias=True)
    mixed = second._replace(U=wide(second).U, U_scales=None)  # only Vh is quantised
    members = [first, second, mixed]
    expected = [dense_linear(x, wide(member)) for member in members]
    torch.testing.assert_close(list(lowrank_linear_grouped(x, members)), expected)
    dense = Dense(torch.ones(2, K, dtype=torch.float64))
    merged = lowrank_linear_merged(x, [*members, dense])
    torch.testing.assert_close(merged, torch.cat([*expected, x @ dense.weight.mT], dim=-1))
    torch.testing.assert_close(lowrank_glu(x, first, second), glu(x, wide(first), wide(second), "silu"))


def test_gradients_flow_to_the_input_and_compiled_calls_give_the_same() -> None:
    x, group = normal((5, K), seeded()).requires_grad_(), quantized("int8", torch.float64)
    torch.library.opcheck(torch.ops.grasp.lowrank_linear.default, (x.detach(), *group, "auto"))
    lowrank_linear(x, *group).sum().backward()
    torch.testing.assert_close(x.grad, dense_linear(torch.eye(K).double(), wide(group)).sum(1).expand_as(x))
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, torch.float16):  # of the scales
            y = lowrank_linear(x.detach().to(dtype), *quantized("int4", dtype, group=32))
            assert y.dtype == torch.bfloat16


def test_int4_values_survive_packing() -> None:
    values = torch.arange(-8, 8).repeat(2, 1)[:, :15]
    assert torch.equal(unpack_int4(pack_int4(values), 15), values.to(torch.int8))
    assert pack_int4(torch.tensor([[0, -8, 7]])).tolist() == [[8, 15 | 8 << 4]]
    assert dequantize(pack_int4(values), torch.ones(2, 1), 15).tolist() == values.float().tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("values", [torch.int8, torch.float8_e4m3fn])
def test_a_product_with_a_scale_is_rounded_once(values: torch.dtype, dtype: torch.dtype) -> None:
    scales = normal((64, 1), seeded()).float()
    weight = torch.arange(-128, 128).expand(64, -1).to(values)
    for given in (scales, scales.to(dtype)):
        exact = weight.double() * given.double()
        assert torch.equal(dequantize(weight, given, 256, dtype), exact.to(dtype))


def test_a_last_group_that_is_shorter_is_compiled_rightly() -> None:
    """Inductor made wrong code for scales that were repeated and cut."""
    values, scales = torch.randint(-127, 128, (4, 90), dtype=torch.int8), torch.rand(4, 3)
    torch.compiler.reset()
    compiled = torch.compile(dequantize, fullgraph=True, dynamic=False)
    expected = values * scales.repeat_interleave(32, dim=1)[:, :90]
    assert torch.equal(compiled(values, scales, 90), expected)


@pytest.mark.parametrize("backend", [row.name for row in BACKENDS if "lowrank_linear" in row.functions])
@pytest.mark.parametrize("rows", [1, 9, 70])
def test_a_dense_weight_with_its_rows_in_any_order_is_factors_of_full_rank(rows: int, backend: str) -> None:
    call = OpCall("lowrank_linear", torch.device("cpu"), torch.float32, rows, N, True, frozenset({"int8"}))
    if (reason := objection(next(row for row in BACKENDS if row.name == backend), call)) is not None:
        pytest.skip(f"{backend}: {reason}")
    x, weight = normal((rows, K), seeded()).float(), torch.randint(-127, 128, (N, K), dtype=torch.int8)
    order, bias = torch.randperm(N, generator=seeded(), dtype=torch.int32), torch.arange(N).float()
    factors = Factors(torch.empty(0, N), None, weight[order], bias, order, None, torch.ones(N, 1))
    expected = x @ weight.float().mT + bias
    close = partial(torch.testing.assert_close, rtol=1e-5, atol=1e-3)  # outputs are in the hundreds
    close(lowrank_linear(x, *factors, backend=backend), expected)
    close(lowrank_linear_merged(x, [factors, factors], backend=backend), torch.cat([expected] * 2, dim=1))


def test_the_number_of_scales_gives_the_size_of_a_group() -> None:
    assert [group_size(groups, 137) for groups in (1, 2, 3, 4, 5)] == [137, 128, 64, None, 32]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"U_scales": torch.ones(N, 3)}, r"U_scales must be \(45, G\).* 37 columns, 1 or 2; got \(45, 3\)"),
        ({"Vh_scales": torch.ones(R)}, r"Vh_scales must be \(37, G\)"),
        ({"Vh_scales": torch.ones(R, 1, dtype=torch.float16)}, "Vh_scales must be float32 or the dtype of x"),
        ({"U": torch.ones(N, R)}, "U with scales must be one of torch.int8 .*got torch.float32"),
        ({"U_scales": None}, "U must have the dtype of x"),
        ({"Vh": torch.zeros(R, K // 2 - 1, dtype=torch.uint8)}, "two int4 are one uint8"),
        ({"s": torch.ones(R)}, "quantised factors have no s"),
        (
            {"s": torch.ones(R), "Vh": torch.ones(R, K), "Vh_scales": None, "bias": None},
            "quantised factors have no s",
        ),
        ({"Vh_scales": [1.0]}, "Vh_scales must be a tensor, got list"),
    ],
)
def test_wrong_scales_are_refused(change: dict[str, Tensor], message: str) -> None:
    group = quantized("int8", torch.float32)._replace(**change)
    with pytest.raises((TypeError, ValueError), match=message):
        lowrank_linear(torch.ones(1, K), *group)


def test_quantised_factors_are_not_packed() -> None:
    with pytest.raises(ValueError, match="quantised factors have no packed form"):
        pack_factors([quantized("int8", torch.float32)])
