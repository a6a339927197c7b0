"""The Triton kernels on pivoted factors in all kinds of configurations; the generic tests try only the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton")

from grasp_kernels import Factors, lowrank_glu
from grasp_kernels.packing import pad_columns, stack_rows, widened
from grasp_kernels.triton import lowrank_glu as glu
from grasp_kernels.triton import lowrank_linear as linear
from grasp_kernels.triton import lowrank_linear_kernels as kernels
from tests import definitions
from tests.numerics import assert_accurate
from tests.ops.inputs import double, factors, normal, pivoted, seeded
from tests.ops.linears import check_linears
from tests.ops.test_triton_lowrank import A100, DEVICE, DTYPES, H100, PAIR
from tests.pairwise import Case, label, pairwise

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.gpu]

K = 50  # two blocks, the last partly filled


def packed(members: Sequence[Factors]) -> list[Factors]:
    """As a model on a GPU packs its parameters, and the kernels find them."""
    Vhs = stack_rows([member.Vh for member in members])
    return [
        widened(member._replace(U=pad_columns(member.U), Vh=Vh), pivoted=True)
        for member, Vh in zip(members, Vhs, strict=True)
    ]


def mixed(dtype: torch.dtype, n: int = 40, rank: int = 5, k: int = K, *, bias: bool = True) -> list[Factors]:
    """A member that is not pivoted and has no bias, and one that is."""
    plain = factors(24, k, 7, seeded(2), s=False, bias=False, dtype=dtype, device=DEVICE)
    return [plain, pivoted(n, k, rank, seeded(3), bias=bias, dtype=dtype, device=DEVICE)]


@pytest.mark.parametrize(
    "case",
    pairwise(
        rows=(3, 1, 16, 65),
        shape=((40, 50, 5), (129, 31, 33), (33, 50, 32), (17, 20, 1)),  # N, K, R
        dtype=DTYPES,
        path=("pair", "gemms"),
        splits=(2, 1),
        reduce=(False, True),
        block_r=(64, 16),
        bias=(True, False),
        packed=(False, True),
    ),
    ids=label,
)
def test_groups_of_mixed_forms_match_float64(case: Case) -> None:
    n, k, rank = case["shape"]
    members = mixed(case["dtype"], n, rank, k, bias=case["bias"])
    x = normal((case["rows"], k), seeded(1), dtype=case["dtype"], device=DEVICE)
    config = replace(
        PAIR, path=case["path"], splits=case["splits"], reduce=case["reduce"], expand_block_r=case["block_r"]
    )
    check_linears(linear.run(x, packed(members) if case["packed"] else members, config), x, members)


@pytest.mark.parametrize("rows", [1, 7])
def test_fused_is_the_pair_in_one_launch(rows: int) -> None:
    x, members = normal((rows, K), seeded(1), dtype=torch.float16, device=DEVICE), mixed(torch.float16)
    counter = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    config = replace(PAIR, path="fused", reduce=rows > 1, block_m=64)
    outputs = [x.new_empty(rows, member.out_features) for member in members]
    launch = linear.fused_launch(
        *(x, members, outputs, linear.new_hidden(x, members, config), config, H100), programs=1
    )
    assert launch.kernel is kernels._lowrank_fused_kernel
    launch._replace(arguments={**launch.arguments, "counter_ptr": counter}).run()
    check_linears(outputs, x, members)


def test_the_program_that_adds_up_partial_sums_does_not_change_the_result() -> None:
    x, members = normal((16, K), seeded(1), dtype=torch.bfloat16, device=DEVICE), mixed(torch.bfloat16)
    every_reader, last_writer = (linear.run(x, members, replace(PAIR, reduce=reduce)) for reduce in (False, True))
    assert all(map(torch.equal, every_reader, last_writer))


@pytest.mark.parametrize("entry", [-1, 40, 2**31 - 1])
def test_a_place_out_of_range_is_not_written(entry: int) -> None:
    x, group = normal((3, K), seeded(1), dtype=torch.float32, device=DEVICE), mixed(torch.float32)[1]
    assert group.order is not None
    group.order[0] = group.order[-1] = entry
    whole = torch.full((3, 44), torch.nan, dtype=torch.float32, device=DEVICE)
    linear.run(x, [group], PAIR, [whole[:, 2:42]])
    assert int(whole.isnan().sum()) == 3 * (2 + 2 + 2)  # around the output, and the two that have no place


GLU_FORMS = {"both": (True, True), "gate": (True, False), "up": (False, True)}


@pytest.mark.parametrize(
    "case",
    pairwise(
        forms=tuple(GLU_FORMS),
        rows=(3, 1, 65),
        dtype=DTYPES,
        path=("pair", "gemms"),
        reduce=(False, True),
        bias=(True, False),
        packed=(False, True),
    ),
    ids=label,
)
def test_gated_unit_matches_float64(case: Case) -> None:
    dtype, bias = case["dtype"], case["bias"]
    members = [
        pivoted(40, K, rank, seeded(rank), bias=bias, dtype=dtype, device=DEVICE)
        if form
        else factors(40, K, rank, seeded(rank), s=not case["packed"], bias=bias, dtype=dtype, device=DEVICE)
        for form, rank in zip(GLU_FORMS[case["forms"]], (5, 33), strict=True)
    ]
    x = normal((case["rows"], K), seeded(1), dtype=dtype, device=DEVICE)
    config = replace(PAIR, path=case["path"], reduce=case["reduce"])
    y = glu.run(x, *(packed(members) if case["packed"] else members), "silu", config)
    exact = definitions.glu(x.double(), *map(double, members), "silu")
    assert_accurate("linear", dtype, y, definitions.glu(x, *members, "silu"), exact)


@pytest.mark.parametrize("order", [(), (0,), (1,), (0, 1)], ids=str)
def test_a_gated_unit_of_many_rows_runs_as_users_call_it(order: tuple[int, ...]) -> None:
    options = {"bias": True, "dtype": torch.float16, "device": DEVICE}
    members = [
        pivoted(40, K, 5, seeded(i), **options) if i in order else factors(40, K, 5, seeded(i), s=True, **options)
        for i in range(2)
    ]
    x = normal((65, K), seeded(1), dtype=torch.float16, device=DEVICE)  # matrix products shrink
    y = lowrank_glu(x, *members, backend="triton")
    exact = definitions.glu(x.double(), *map(double, members), "silu")
    assert_accurate("linear", x.dtype, y, definitions.glu(x, *members, "silu"), exact)


def test_relu_keeps_nan() -> None:
    gate, up = (factors(40, K, 5, seeded(i), s=True, bias=True, dtype=torch.float32, device=DEVICE) for i in range(2))
    gate.U[7, 0] = torch.nan
    x = normal((3, K), seeded(1), dtype=torch.float32, device=DEVICE)
    y = lowrank_glu(x, gate, up, activation="relu", backend="triton")
    assert y[:, 7].isnan().all()
    assert y.isnan().sum() == 3


def test_launches_are_as_many_as_without_pivots_and_read_fewer_rows_of_u() -> None:
    x = torch.empty(4, K, dtype=torch.bfloat16)
    members = [*mixed(torch.bfloat16), pivoted(18, K, 17, seeded(), dtype=torch.bfloat16)]
    outputs = [x.new_empty(4, member.out_features) for member in members]
    for gpu in (A100, H100):
        launches = linear.plan(x, members, outputs, PAIR, gpu)
        assert len(launches) == 2
        assert launches[1].grid == (1 + 2 + 1, 1)
        assert launches[1].arguments["pivots"] == (0, 5, 17)
        assert len(glu.plan(x, members[1], members[1], "silu", outputs[1], PAIR, gpu)) == 2


def test_without_pivots_a_kernel_gets_none_of_their_arguments() -> None:
    x, member = torch.empty(4, K, dtype=torch.bfloat16), mixed(torch.bfloat16)[0]
    output = x.new_empty(4, 24)
    launches = linear.plan(x, [member], [output], PAIR, H100) + glu.plan(x, member, member, "silu", output, PAIR, H100)
    optional = ("order_ptr", "entries_ptr", "order_ptrs", "pivots", "gate_order_ptr", "up_entries_ptr", "up_pivots")
    given = [launch.arguments[name] for launch in launches for name in optional if name in launch.arguments]
    assert given == [None] * (2 + 2 + 2 + 3)
