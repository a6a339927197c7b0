"""int8 and int4 factors in the kernels of every instruction set."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels import Factors, cpu, lowrank_linear
from grasp_kernels import direct as direct_path
from grasp_kernels.dispatch import backend_missing
from grasp_kernels.quantized import pack_int4
from tests.definitions import glu
from tests.numerics import assert_accurate
from tests.ops.inputs import DTYPES, double, factors, normal, pivoted, seeded
from tests.ops.linears import check_linear
from tests.pairwise import Case, label, pairwise

if (reason := backend_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INSTRUCTION_SETS = [name for name in cpu.INSTRUCTION_SETS if cpu.supports(name)]
CASES = pairwise(
    instruction_set=INSTRUCTION_SETS,
    dtype=DTYPES,
    U=("int8", "int4", None),
    Vh=("int4", "int8", None),
    group=(None, 32, 64, 128),
    scales_dtype=(torch.float32, None),
    form=("low-rank", "pivoted", "dense"),
    rows=(1, 3, 8, 9, 33, 64, 70),
    K=(576, 63, 1, 127, 257, 1153),
    N=(100, 1, 33, 200),
    rank=(137, 1, 64, 255),
    threads=(1, 2),
    bias=(True, False),
)


def quantize(weight: Tensor, kind: str | None, group: int | None, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The values, in rows that lie apart, and scales; some scales are zero and some negative."""
    if kind is None:
        return weight, None
    highest, depth = {"int8": 127, "int4": 7}[kind], weight.shape[1]
    padded = torch.nn.functional.pad(weight.float(), (0, -depth % (group or depth)))
    blocks = padded.unflatten(1, (-1, group or depth))
    scales = blocks.abs().amax(2) / highest
    scales[1::3] *= -1
    scales[2::5] = 0
    scales = scales.to(dtype)
    values = (blocks / scales[..., None].float()).nan_to_num(nan=highest, posinf=highest, neginf=-highest)
    values = values.round().clamp(-highest - 1, highest).flatten(1)[:, :depth]
    stored = values.to(torch.int8) if kind == "int8" else pack_int4(values)
    apart = torch.full((stored.shape[0], stored.shape[1] + 5), 85, dtype=stored.dtype)
    return apart[:, : stored.shape[1]].copy_(stored), scales


def quantized(group: Factors, U: str | None, Vh: str | None, size: int | None, dtype: torch.dtype) -> Factors:
    U_values, U_scales = quantize(group.U, U, size, dtype)
    Vh_values, Vh_scales = quantize(group.Vh, Vh, size, dtype)
    return group._replace(U=U_values, Vh=Vh_values, U_scales=U_scales, Vh_scales=Vh_scales)


def dense(N: int, K: int, generator: torch.Generator, *, bias: bool, dtype: torch.dtype) -> Factors:
    Vh = normal((N, K), generator, dtype=dtype, scale=K**-0.5)
    b = normal((N,), generator, dtype=dtype) if bias else None
    return Factors(Vh.new_empty(0, N), None, Vh, b, torch.randperm(N, generator=generator).int())


def draw(form: str, N: int, K: int, R: int, *, bias: bool, dtype: torch.dtype) -> Factors:
    if form == "dense":
        return dense(N, K, seeded(), bias=bias, dtype=dtype)
    if form == "pivoted":
        return pivoted(N + R, K, R, seeded(), bias=bias, dtype=dtype)
    return factors(N, K, R, seeded(), s=False, bias=bias, dtype=dtype)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_instruction_set_matches_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype = case["dtype"]
    group = draw(case["form"], case["N"], case["K"], case["rank"], bias=case["bias"], dtype=dtype)
    group = quantized(group, case["U"], case["Vh"], case["group"], case["scales_dtype"] or dtype)
    x = normal((case["rows"], case["K"]), seeded(1), dtype=dtype)
    monkeypatch.setattr(torch, "get_num_threads", lambda: case["threads"])
    (y,) = cpu.run(x, [group], instruction_set=case["instruction_set"])
    check_linear(y, x, group)


@pytest.mark.parametrize("rows", [2, 6, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_groups_and_gated_units_mix_forms(instruction_set: str, dtype: torch.dtype, rows: int) -> None:
    x = normal((rows, 300), seeded(2), dtype=dtype)
    floating = factors(90, 300, 33, seeded(3), s=True, bias=True, dtype=dtype)
    forms = (("int8", "int8"), ("int4", "int8"), (None, "int4"), ("int8", None))
    groups = [floating] + [quantized(floating._replace(s=None), *form, 32, torch.float32) for form in forms]
    for y, group in zip(cpu.run(x, groups, instruction_set=instruction_set), groups, strict=True):
        check_linear(y, x, group)
    gate, up = groups[3], groups[0]
    (y,) = cpu.run(x, [gate, up], activation="silu", instruction_set=instruction_set)
    check_glu(y, x, gate, up)


def check_glu(y: Tensor, x: Tensor, *pair: Factors) -> None:
    wide = [double(group.dequantized(300, torch.float64)) for group in pair]
    plain = glu(x, *(group.dequantized(300, x.dtype) for group in pair), "silu")
    assert_accurate("linear", x.dtype, y, plain, glu(x.double(), *wide, "silu"))


def test_a_gated_unit_may_be_pivoted() -> None:
    x = normal((2, 300), seeded(2), dtype=torch.bfloat16)
    gate, up = (
        quantized(pivoted(90, 300, 33, seeded(seed), bias=True, dtype=x.dtype), kind, kind, 64, torch.float32)
        for seed, kind in ((3, "int8"), (4, "int4"))
    )
    check_glu(cpu.lowrank_glu(x, gate, up, "silu"), x, gate, up)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_extreme_inputs_stay_in_their_row(instruction_set: str, kind: str) -> None:
    for rows in (4, 12):
        group = factors(50, 300, 35, seeded(), s=False, bias=False, dtype=torch.float32)
        group = quantized(group, kind, kind, 64, torch.float32)
        x = normal((rows, 300), seeded(1), dtype=torch.float32)
        x[1, 299], x[2], x[3] = torch.nan, x[3] * 1e-30, 0
        x[0, 7] = 1e4
        (y,) = cpu.run(x, [group], instruction_set=instruction_set)
        assert y[1].isnan()[group.U_scales.abs().amax(1) > 0].all()
        assert not y[3].any()
        for row in (0, 2):
            check_linear(y[row : row + 1], x[row : row + 1], group)


def test_int8_values_reach_minus_128() -> None:
    values = torch.full((3, 200), -128, dtype=torch.int8)
    weight = Factors(torch.empty(0, 3), None, values, None, torch.arange(3).int(), None, torch.ones(3, 1))
    for rows in (1, 9):
        for instruction_set in INSTRUCTION_SETS:
            (y,) = cpu.run(torch.full((rows, 200), 3.0), [weight], instruction_set=instruction_set)
            torch.testing.assert_close(y, torch.full((rows, 3), -128.0 * 600), rtol=1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 8, 20])
def test_the_result_does_not_depend_on_the_number_of_threads(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    group = factors(900, 1000, 450, seeded(), s=False, bias=True, dtype=torch.bfloat16)
    group = quantized(group, "int8", "int4", 32, torch.bfloat16)
    x = normal((rows, 1000), seeded(1), dtype=torch.bfloat16)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        results += cpu.run(x, [group])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_direct_path_takes_quantised_factors() -> None:
    x = normal((2, 3, 64), seeded(1), dtype=torch.bfloat16)
    group = quantized(
        factors(40, 64, 33, seeded(), s=False, bias=True, dtype=torch.bfloat16), "int4", "int8", 32, x.dtype
    )
    expected = cpu.run(x.flatten(0, 1), [group])[0].view(2, 3, 40)
    y = direct_path.linear(x, *group, "auto")
    assert y is not None
    assert torch.equal(y, expected)
    grouped = direct_path.grouped(x, [group, group], "auto")
    assert grouped is not None
    assert torch.equal(grouped[1], expected)
    unlike = group._replace(U_scales=group.U_scales.float())
    assert direct_path.linear(x, *unlike, "auto") is None  # the registered op converts scales of two dtypes
    torch.testing.assert_close(lowrank_linear(x, *unlike), expected)


def test_the_compiled_module_refuses_scales_that_do_not_fit() -> None:
    x, scales = torch.zeros(3, 70), torch.ones(6, 1)
    weight = Factors(torch.zeros(6, 40, dtype=torch.int8), None, torch.zeros(40, 70), None, None, scales)
    changes = (
        {"U_scales": None},
        {"U_scales": torch.ones(5, 1)},
        {"U_scales": torch.ones(6, 3)},
        {"U_scales": torch.ones(6, 1).half()},
        {"U_scales": torch.ones(6)},
        {"U": torch.zeros(6, 40, dtype=torch.uint8)},
        {"U": torch.zeros(6, 40)},
        {"Vh_scales": torch.ones(40, 1)},
        {"Vh": torch.zeros(40, 70, dtype=torch.int8), "Vh_scales": torch.ones(40, 1), "s": torch.ones(40)},
        {"Vh": torch.zeros(40, 34, dtype=torch.uint8), "Vh_scales": torch.ones(40, 1)},
    )
    assert cpu.run(x, [weight])[0].shape == (3, 6)
    for change in changes:
        with pytest.raises(ValueError, match="do not agree"):
            cpu.run(x, [weight._replace(**change)])
