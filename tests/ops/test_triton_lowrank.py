"""The Triton kernels of low-rank linears in all kinds of configurations; the generic grid tests only the default."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from grasp_kernels import Factors, pack_factors
from grasp_kernels.launch_configs import Config
from grasp_kernels.reference import ACTIVATIONS
from grasp_kernels.triton import lowrank_glu as glu
from grasp_kernels.triton import lowrank_linear as linear
from grasp_kernels.triton import lowrank_linear_kernels as kernels
from grasp_kernels.triton import shrink
from grasp_kernels.triton.launch import Gpu, gpu_of
from tests import definitions
from tests.numerics import FLOORS, assert_accurate, relative_error
from tests.ops.inputs import double, factors, normal, seeded
from tests.ops.linears import check_linears
from tests.pairwise import Case, label, pairwise

pytestmark = [pytest.mark.usefixtures("poisoned_memory"), pytest.mark.gpu, pytest.mark.long]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
H100, A100 = Gpu("NVIDIA H100 80GB HBM3", 132, 90), Gpu("NVIDIA A100-SXM4-80GB", 108, 80)
PAIR = Config(
    path="pair",
    block_m=32,
    shrink_block_r=16,
    shrink_block_k=32,
    splits=2,
    shrink_warps=4,
    reduce=False,
    expand_block_n=32,
    expand_block_r=64,
    expand_warps=4,
    stages=2,
)
K = 100  # four blocks, the last partly filled: one of two splits is shorter, one of three is empty
SHAPES = ((40, 5), (32, 33), (7, 16))  # (N, R) of each member


def group(generator: torch.Generator, dtype: torch.dtype, members: int, *, s: bool, bias: bool) -> list[Factors]:
    """Members of unequal shapes; the second never has an s, the third never a bias."""
    return [
        factors(N, K, R, generator, s=s and index != 1, bias=bias and index != 2, dtype=dtype, device=DEVICE)
        for index, (N, R) in enumerate(SHAPES[:members])
    ]


@pytest.mark.parametrize(
    "case",
    pairwise(
        rows=(3, 1, 2, 40),
        dtype=DTYPES,
        splits=(2, 1, 3),
        reduce=(False, True),
        block_r=(64, 16),  # a rank in one step, or in several
        members=(3, 1),
        s=(True, False),
        bias=(True, False),
        packed=(False, True),
    ),
    ids=label,
)
def test_pair_matches_float64(case: Case) -> None:
    generator = seeded()
    x = normal((case["rows"], K), generator, dtype=case["dtype"], device=DEVICE)
    members = group(generator, case["dtype"], case["members"], s=case["s"], bias=case["bias"])
    config = replace(PAIR, splits=case["splits"], reduce=case["reduce"], expand_block_r=case["block_r"])
    check_linears(linear.run(x, pack_factors(members) if case["packed"] else members, config), x, members)


def test_the_program_that_adds_up_partial_sums_does_not_change_the_result() -> None:
    generator = seeded()
    for rows in (1, 40):
        x = normal((rows, K), generator, dtype=torch.bfloat16, device=DEVICE)
        # With an s, the h that a dot reads is rounded to 16 bits before and after its multiplication by s.
        members = group(generator, torch.bfloat16, 3, s=rows == 1, bias=True)
        every_reader, last_writer = (linear.run(x, members, replace(PAIR, reduce=reduce)) for reduce in (False, True))
        for a, b in zip(every_reader, last_writer, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("path", ["pair", "gemms"])
def test_singular_values_beyond_the_range_of_fp16_do_not_overflow(path: str, rows: int, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((rows, K), generator, dtype=dtype, device=DEVICE)
    U, s, Vh, bias, *_ = factors(32, K, 8, generator, s=True, bias=True, dtype=dtype, device=DEVICE)
    assert s is not None
    member = Factors(U / 1024, s * 1e5, Vh, bias)  # h * s is above 65504
    (y,) = linear.run(x, [member], replace(PAIR, path=path))
    assert relative_error(y, definitions.dense_linear(x.double(), double(member))) < 2 * FLOORS["linear", dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_outputs_are_rounded_to_nearest(rows: int, dtype: torch.dtype) -> None:
    """Products of two 16-bit numbers are exact in fp32: only the output is rounded."""
    generator = seeded()
    x, U = (normal((size, 1), generator, dtype=dtype, device=DEVICE) for size in (rows, 64))
    (y,) = linear.run(x, [Factors(U, None, torch.ones_like(x[:1]))], PAIR)
    assert torch.equal(y, (x.float() * U.float().mT).to(dtype))


# --- one launch -------------------------------------------------------------------------------------------------------


def fused(
    x: Tensor, members: Sequence[Factors], config: Config, programs: int, phases: Sequence[int], counter: Tensor
) -> list[Tensor]:
    """Run phases of the fused kernel, one launch each, on given counters."""
    outputs = [x.new_empty(x.shape[0], member.U.shape[0]) for member in members]
    hidden = linear.new_hidden(x, members, config)
    for phase in phases:
        launch = linear.fused_launch(
            x, members, outputs, hidden, config, gpu_of(x.device), programs=programs, phase=phase
        )
        launch._replace(arguments={**launch.arguments, "counter_ptr": counter}).run()
    return outputs


@pytest.mark.parametrize(
    ("programs", "phases"),
    [
        (1, (kernels.BOTH_PHASES,)),  # with the barrier
        (1, (kernels.SHRINK_ONLY, kernels.EXPAND_ONLY)),
        (4, (kernels.SHRINK_ONLY, kernels.EXPAND_ONLY)),  # several tiles each
        (50, (kernels.SHRINK_ONLY, kernels.EXPAND_ONLY)),  # more programs than tiles
    ],
)
@pytest.mark.parametrize(
    "case", pairwise(rows=(7, 1, 2, 40), dtype=DTYPES, reduce=(False, True), members=(3, 1), s=(True, False)), ids=label
)
def test_fused_is_the_pair_in_one_launch(programs: int, phases: tuple[int, ...], case: Case) -> None:
    generator = seeded()
    x = normal((case["rows"], K), generator, dtype=case["dtype"], device=DEVICE)
    members = group(generator, case["dtype"], case["members"], s=case["s"], bias=True)
    config = replace(PAIR, path="fused", reduce=case["reduce"], block_m=64)
    counter = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    check_linears(fused(x, members, config, programs, phases, counter), x, members)


def test_barrier_and_counters_are_ready_for_the_next_launch() -> None:
    generator = seeded()
    members = group(generator, torch.float32, 3, s=False, bias=True)
    config = replace(PAIR, path="fused", reduce=True)
    counter = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    words = []
    for _ in range(5):
        x = normal((7, K), generator, dtype=torch.float32, device=DEVICE)
        check_linears(fused(x, members, config, 1, [kernels.BOTH_PHASES], counter), x, members)
        assert not counter[1:].any()
        words.append(int(counter[0]) & 0xFFFFFFFF)
    assert words == [1 << 30, 2 << 30, 3 << 30, 0, 1 << 30]  # one bit flips; the bits above it wrap, those below stay 0


def test_a_pair_can_follow_a_fused_launch_on_the_same_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded()
    members = group(generator, torch.float32, 3, s=False, bias=True)
    x = normal((7, K), generator, dtype=torch.float32, device=DEVICE)
    shared = torch.zeros(64, dtype=torch.int32, device=DEVICE)
    monkeypatch.setattr(linear, "counters", lambda *_: shared)
    fused(x, members, replace(PAIR, path="fused", reduce=True), 1, [kernels.BOTH_PHASES], shared)
    assert shared[0] != 0
    check_linears(linear.run(x, members, replace(PAIR, reduce=True)), x, members)


def test_fused_falls_back_to_the_pair_for_calls_it_cannot_run() -> None:
    def launches(rows: int, rank: int) -> int:
        x = torch.empty(rows, K)
        member = Factors(torch.empty(16, rank), None, torch.empty(rank, K))
        return len(linear.plan(x, [member], [torch.empty(rows, 16)], replace(PAIR, path="fused"), H100))

    assert launches(64, 256) == 1
    assert launches(65, 256) == 2
    assert launches(64, 257) == 2


# --- gated linear units -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    pairwise(
        rows=(7, 1, 2, 40),
        dtype=DTYPES,
        activation=tuple(ACTIVATIONS),
        path=("pair", "gemms"),
        block_r=(64, 16),
        reduce=(False, True),
        s=(True, False),
        bias=(True, False),
        packed=(False, True),
    ),
    ids=label,
)
def test_gated_unit_matches_float64(case: Case) -> None:
    generator, dtype = seeded(), case["dtype"]
    x = normal((case["rows"], K), generator, dtype=dtype, device=DEVICE)
    gate = factors(40, K, 5, generator, s=case["s"], bias=case["bias"], dtype=dtype, device=DEVICE)
    up = factors(40, K, 33, generator, s=False, bias=case["bias"], dtype=dtype, device=DEVICE)
    config = replace(PAIR, path=case["path"], reduce=case["reduce"], expand_block_r=case["block_r"])
    given = pack_factors([gate, up]) if case["packed"] else [gate, up]
    y = glu.run(x, given[0], given[1], case["activation"], config)
    exact = definitions.glu(x.double(), double(gate), double(up), case["activation"])
    assert_accurate("linear", dtype, y, definitions.glu(x, gate, up, case["activation"]), exact)


# --- plans ------------------------------------------------------------------------------------------------------------


def pair_plan(gpu: Gpu) -> list[linear.Launch]:
    x = torch.empty(4, K, dtype=torch.bfloat16)
    members = group(seeded(), torch.bfloat16, 3, s=True, bias=True)
    return linear.plan(x, members, [x.new_empty(4, N) for N, _ in SHAPES], PAIR, gpu)


def test_a_group_is_two_launches_which_start_early_on_sm_90() -> None:
    for gpu, dependent in ((H100, True), (A100, False)):
        launches = pair_plan(gpu)
        assert len(launches) == 2
        for launch in launches:
            assert launch.arguments["DEPENDENT"] is dependent
            assert launch.options.get("launch_pdl", False) is dependent


@pytest.mark.skipif(DEVICE == "cuda", reason="replaces functions of interpreted kernels")
@pytest.mark.parametrize(("rows", "columns"), [(1, 100), (5, 96), (40, 51)])
def test_dependent_launches_prefetch_every_row_of_vh_once_and_compute_the_same(
    rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = seeded()
    x = normal((rows, columns), generator, dtype=torch.bfloat16)
    members = [factors(N, columns, R, generator, s=True, bias=True, dtype=torch.bfloat16) for N, R in SHAPES]
    expected = linear.run(x, members, PAIR)
    ranges: list[tuple[int, int]] = []

    def record(begin: Any, size: Any) -> None:
        pairs = zip(begin.handle.data.ravel().tolist(), size.handle.data.ravel().tolist(), strict=True)
        ranges.extend((first, length) for first, length in pairs if length)

    for module in (shrink, kernels):
        monkeypatch.setattr(module, "wait_and_release", lambda: None)
    monkeypatch.setattr(shrink, "prefetch", record)
    outputs = [torch.full_like(y, torch.nan) for y in expected]
    for launch in linear.plan(x, members, outputs, PAIR, H100):
        launch.run()
    assert all(map(torch.equal, outputs, expected))
    assert all(first % 16 == 0 and length % 16 == 0 for first, length in ranges)
    whole: list[int] = []
    for member in members:
        for row in member.Vh:  # a row ends within 16 bytes of the prefetched end
            whole += range(row.data_ptr() // 16, (row.data_ptr() + row.nbytes) // 16)
    assert sorted(granule for first, length in ranges for granule in range(first // 16, (first + length) // 16)) == (
        sorted(whole)
    )


@pytest.mark.parametrize(
    ("rows", "rank", "tiles"), [(16, 1648, 5), (16, 1638, 2), (32, 1648, 8), (32, 1638, 4), (16, 81, 1)]
)
def test_an_expand_loads_fewer_tiles_ahead_if_each_element_takes_a_register(rows: int, rank: int, tiles: int) -> None:
    """Of a rank of 1638, five tiles at 16 rows and three at 4 spill registers, two do not: compiled for sm_90."""
    member = Factors(torch.empty(16, rank, dtype=torch.bfloat16), None, torch.empty(rank, 16, dtype=torch.bfloat16))
    config = replace(PAIR, block_m=64, expand_block_r=128 if rows == 16 else 64)
    assert linear.tiles_ahead(rows, [member], config) == tiles


def test_the_fused_launch_is_cooperative_and_has_no_more_programs_than_the_card_processors() -> None:
    x = torch.empty(4, 4096, dtype=torch.bfloat16)
    member = Factors(x.new_empty(8192, 208), None, x.new_empty(208, 4096))
    (launch,) = linear.plan(x, [member], [x.new_empty(4, 8192)], replace(PAIR, path="fused"), H100)
    assert launch.grid == (132,)
    assert launch.options["launch_cooperative_grid"] is True


def test_a_packed_group_is_one_matrix_product_and_one_tensor_to_the_shrink() -> None:
    generator = seeded()
    x = normal((4, K), generator, dtype=torch.float32)
    members = group(generator, torch.float32, 3, s=False, bias=False)
    packed = pack_factors(members)
    hs = linear.hidden_gemm(x, [member.Vh for member in packed])
    assert len({h.untyped_storage().data_ptr() for h in hs}) == 1
    shrink, _ = linear.plan(x, packed, [x.new_empty(4, N) for N, _ in SHAPES], PAIR, A100)
    assert shrink.arguments["ranks"] == (16 + 48 + 16,)
    shrink, _ = linear.plan(x, members, [x.new_empty(4, N) for N, _ in SHAPES], PAIR, A100)
    assert shrink.arguments["ranks"] == (5, 33, 16)


@pytest.mark.parametrize(("rows", "widths"), [(0, (16, 8)), (3, (0, 8)), (3, (0, 0))])
def test_empty_outputs_launch_nothing(rows: int, widths: tuple[int, int]) -> None:
    generator = seeded()
    x = normal((rows, K), generator, dtype=torch.float32, device=DEVICE)
    members = [factors(N, K, 4, generator, s=False, bias=True, dtype=torch.float32, device=DEVICE) for N in widths]
    ys = linear.run(x, members, PAIR)
    assert [y.shape for y in ys] == [(rows, N) for N in widths]
    check_linears(ys, x, members)
