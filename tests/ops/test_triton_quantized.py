"""The Triton kernels on quantised factors in all kinds of configurations; the generic tests try only the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from grasp_kernels import Factors
from grasp_kernels.quantized import KINDS
from grasp_kernels.triton import lowrank_linear as linear
from grasp_kernels.triton.lowrank_glu import lowrank_glu
from tests import definitions
from tests.numerics import assert_accurate
from tests.ops.inputs import normal, seeded
from tests.ops.linears import check_linears
from tests.ops.test_quantized import K, N, only, quantized, wide
from tests.ops.test_triton_lowrank import DEVICE, H100, PAIR
from tests.pairwise import Case, label, pairwise

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.gpu]


def on_device(group: Factors) -> Factors:
    return Factors(*(None if tensor is None else tensor.to(DEVICE) for tensor in group))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "case",
    pairwise(
        rows=(3, 1, 2),
        kind=tuple(KINDS.values()),
        group=(32, None, 64),  # columns per scale
        block=(16, 64),  # columns of a tile: less, or more, than a group
        dtype=(torch.bfloat16, torch.float16, torch.float32),
        side=("both", "U", "Vh"),
        reduce=(False, True),
        pivoted=(False, True),
    ),
    ids=label,
)
def test_pair_matches_float64(case: Case) -> None:
    dtype = case["dtype"]
    both = [
        quantized(case["kind"], dtype, group=case["group"], pivoted=pivoted, bias=pivoted)
        for pivoted in ((False, True) if case["pivoted"] else (False,))
    ]
    members = [on_device(only(group, case["side"])) for group in both]
    x = normal((case["rows"], K), seeded(), dtype=dtype, device=DEVICE)
    config = replace(PAIR, reduce=case["reduce"], shrink_block_k=case["block"], expand_block_r=case["block"])
    check_linears(linear.run(x, members, config), x, members)


@pytest.mark.parametrize("pivoted", [False, True])
def test_a_gated_unit_matches_float64(pivoted: bool) -> None:
    sizes = (300, N, 37)
    gate = on_device(quantized("int4", torch.float16, group=128, pivoted=pivoted, sizes=sizes))
    up = on_device(quantized("int8", torch.float16, bias=True, sizes=sizes))
    x = normal((3, 300), seeded(), dtype=torch.float16, device=DEVICE)
    plain = definitions.glu(x, gate.dequantized(300, x.dtype), up.dequantized(300, x.dtype), "silu")
    exact = definitions.glu(x.double(), wide(gate, 300), wide(up, 300), "silu")
    assert_accurate("linear", x.dtype, lowrank_glu(x, gate, up, "silu"), plain, exact)


def test_members_that_are_stored_alike_share_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = normal((3, K), seeded(), dtype=torch.float32, device=DEVICE)
    int8, int4 = (on_device(quantized(kind, torch.float32, group=32)) for kind in ("int8", "int4"))
    members = [int8, int4, int4.dequantized(K, torch.float32), int8]
    shared: list[int] = []
    run = linear.run

    def record(x: Tensor, factors: Sequence[Factors], *rest: object) -> list[Tensor]:
        shared.append(len(factors))
        return run(x, factors, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(linear, "run", record)
    check_linears(linear.lowrank_linear_grouped(x, members), x, members)
    assert shared == [2, 1, 1]


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 16, 40])
def test_a_dense_weight_is_factors_of_full_rank(kind: str, rows: int) -> None:
    dense = quantized(kind, torch.bfloat16, group=32, sizes=(K, 80, 80))
    order = torch.randperm(80, generator=seeded(), dtype=torch.int32)
    group = dense._replace(U=torch.empty(0, 80, dtype=torch.bfloat16), U_scales=None, order=order, bias=None)
    group = on_device(group)
    x = normal((rows, K), seeded(), dtype=torch.bfloat16, device=DEVICE)
    check_linears(linear.lowrank_linear_grouped(x, [group]), x, [group])


def test_half_a_byte_behind_an_odd_column_does_not_matter() -> None:
    x = normal((3, K - 1), seeded(), dtype=torch.float32, device=DEVICE)
    group = on_device(quantized("int4", torch.float32))
    changed = group._replace(Vh=group.Vh.clone())
    changed.Vh[:, -1] ^= 0xF0
    first, second = (linear.run(x, [factors], PAIR)[0] for factors in (group, changed))
    assert torch.equal(first, second)


def test_the_fused_launch_refuses_quantised_factors() -> None:
    x, group = torch.empty(3, K, dtype=torch.bfloat16), quantized("int8", torch.bfloat16)
    assert len(linear.plan(x, [group], [x.new_empty(3, N)], replace(PAIR, path="fused"), H100)) == 2
