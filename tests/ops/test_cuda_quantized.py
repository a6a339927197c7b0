"""The CUDA kernels on quantised factors: emulated, and on a card."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from grasp_kernels import Factors, cuda
from grasp_kernels.dispatch import BACKENDS, OpCall, objection
from tests.ops.cuda_emulator import Emulator
from tests.ops.inputs import normal, seeded
from tests.ops.linears import check_linears
from tests.ops.test_quantized import only, quantized
from tests.pairwise import Case, label, pairwise

DTYPES = (torch.bfloat16, torch.float16)
ROW = next(row for row in BACKENDS if row.name == "cuda")
CASES = pairwise(
    rows=(16, 1, 9, 3),
    kind=("int8", "int4"),
    sizes=((1120, 136, 80), (70, 45, 37), (2080, 330, 304), (64, 33, 16)),  # K, N, R; whether a lane may load 8 bytes
    group=(None, 32, 64, 128),  # columns per scale
    dtype=DTYPES,
    scales=("own", "fp32", "fp32 of U"),
    side=("both", "U", "Vh"),
    pivoted=(False, True),
    bias=(True, False),
    seed=(1, 0),
    processors=(3, 16, 1),
)


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Factors]:
    K, dtype = case["sizes"][0], case["dtype"]
    options = {name: case[name] for name in ("group", "pivoted", "bias", "sizes")}
    group = only(quantized(case["kind"], dtype, **options), case["side"], K)
    if case["side"] == "U" and not case["pivoted"]:
        group = group._replace(s=normal((group.rank,), seeded(5)).abs().to(dtype))
    names = {"own": (), "fp32 of U": ("U_scales",), "fp32": ("U_scales", "Vh_scales")}[case["scales"]]
    given = {name: getattr(group, name) for name in names}
    group = group._replace(**{name: scales.float() for name, scales in given.items() if scales is not None})
    x = normal((case["rows"], K), seeded(), dtype=dtype, device=device)
    return x, Factors(*(None if field is None else field.to(device) for field in group))  # type: ignore[arg-type]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernels_match_float64(emulator: Emulator, case: Case) -> None:
    x, group = inputs(case)
    emulator.configure(processors=case["processors"], seed=case["seed"])
    outputs = cuda.run(x, [group])
    assert [launch.kind for launch in emulator.finish()] == ["shrink", "expand"]
    check_linears(outputs, x, [group])


@pytest.mark.gpu
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=label)
def test_a_card_agrees_with_float64(case: Case) -> None:
    call = OpCall("lowrank_linear", torch.device("cuda"), case["dtype"], case["rows"], 1, weights=frozenset({"int8"}))
    if (reason := objection(ROW, call)) is not None:
        pytest.skip(f"cuda: {reason}")
    x, group = inputs(case, "cuda")
    check_linears(cuda.run(x, [group]), x, [group])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kind", "most"), [("int8", 4), ("int4", 2)])
def test_every_number_of_splits_gives_the_result(emulator: Emulator, dtype: torch.dtype, kind: str, most: int) -> None:
    sizes = (2048, 64, 32)
    x, group = normal((1, 2048), seeded(), dtype=dtype), quantized(kind, dtype, group=32, sizes=sizes)
    blocks = set()
    for splits in range(1, 9):
        emulator.configure()
        outputs = cuda.run(x, [group], splits=splits)
        blocks.add(emulator.finish()[0].blocks // 2)
        check_linears(outputs, x, [group])
    assert max(blocks) == most


def test_members_that_are_stored_alike_share_launches(emulator: Emulator) -> None:
    dtype, sizes = torch.bfloat16, (192, 96, 32)
    int8, int4 = (quantized(kind, dtype, group=64, pivoted=True, bias=True, sizes=sizes) for kind in ("int8", "int4"))
    plain = quantized("int8", dtype, sizes=sizes).dequantized(192, dtype)
    groups = [int8, int8, int4, plain, int8]
    x = normal((2, 192), seeded(), dtype=dtype)
    whole = x.new_full((2, 3 + 5 * 96), torch.nan)
    outputs = cuda.run(x, groups, whole[:, 3:].split(96, dim=1))
    assert len(emulator.finish()) == 8  # four pairs
    assert whole[:, :3].isnan().all()
    check_linears(outputs, x, groups)


@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("rows", [1, 16])
@pytest.mark.parametrize("is_whole", [False, True], ids=["U in floats", "all"])
def test_a_dense_weight_is_factors_of_full_rank(emulator: Emulator, kind: str, rows: int, is_whole: bool) -> None:
    dense = quantized(kind, torch.bfloat16, group=32, sizes=(256, 80, 80))
    order = torch.randperm(80, generator=seeded(), dtype=torch.int32)
    U, scales = torch.empty(0, 80, dtype=torch.bfloat16), None
    if is_whole:
        assert dense.U_scales is not None
        U, scales = dense.U[:0], dense.U_scales[:0]
    group = dense._replace(U=U, U_scales=scales, order=order, bias=None)
    x = normal((rows, 256), seeded(), dtype=torch.bfloat16)
    outputs = cuda.run(x, [group])
    emulator.finish()
    check_linears(outputs, x, [group])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_a_byte_behind_an_odd_column_does_not_matter(emulator: Emulator, dtype: torch.dtype) -> None:
    x, group = normal((3, 69), seeded(), dtype=dtype), quantized("int4", dtype, sizes=(69, 45, 37))
    changed = group._replace(U=group.U.clone(), Vh=group.Vh.clone())
    for weight in (changed.U, changed.Vh):
        weight[:, -1] ^= 0xF0
    first, second = (cuda.run(x, [factors])[0] for factors in (group, changed))
    emulator.finish()
    assert torch.equal(first, second)


@pytest.mark.parametrize("shifted", ["U", "Vh"])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_matrix_may_start_anywhere(emulator: Emulator, kind: str, shifted: str) -> None:
    x, group = normal((3, 64), seeded(), dtype=torch.float16), quantized(kind, torch.float16, sizes=(64, 40, 16))
    values = getattr(group, shifted)
    moved = torch.cat([values.new_full((1,), 77), values.flatten()])[1:].view(values.shape)
    outputs = cuda.run(x, [group._replace(**{shifted: moved})])
    emulator.finish()
    check_linears(outputs, x, [group])


def test_extreme_values_are_exact(emulator: Emulator) -> None:
    """-128 and -8, a negative scale, and a weight that is beyond the range of fp16."""
    x = torch.full((1, 64), 2.0**-11, dtype=torch.float16)
    Vh, U = torch.full((1, 64), -128, dtype=torch.int8), torch.zeros(8, 1, dtype=torch.uint8)
    group = Factors(U, None, Vh, None, None, torch.full((8, 1), 2.0**-10), torch.full((1, 1), -8192.0))
    (y,) = cuda.run(x, [group])
    emulator.finish()
    assert y.tolist() == [[64 / 2**11 * 128 * 8192 * -8 / 2**10] * 8]


def test_fp32_has_no_kernels_for_them(emulator: Emulator) -> None:
    with pytest.raises(RuntimeError, match="x must be in 16 bits"):
        cuda.run(torch.ones(1, 70), [quantized("int8", torch.float32)])
    assert emulator.finish() == []


def test_the_cooperative_kernel_refuses_them(emulator: Emulator) -> None:
    x, group = normal((1, 70), seeded(), dtype=torch.bfloat16), quantized("int8", torch.bfloat16)
    with pytest.raises(RuntimeError, match=re.escape("no quantised factors, got U of 8 and Vh of 8 bits")):
        cuda.run(x, [group], path="cooperative")
    assert emulator.finish() == []


@pytest.mark.parametrize(
    ("kind", "dtype", "reason"),
    [
        ("int8", torch.bfloat16, None),
        ("int4", torch.float16, None),
        ("fp8", torch.bfloat16, "it has no kernel for fp8 factors"),
        ("int4", torch.float32, "it has kernels for int4 factors in 16 bits only"),
    ],
)
def test_the_table_gives_it_integers(
    monkeypatch: pytest.MonkeyPatch, kind: str, dtype: torch.dtype, reason: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    call = OpCall("lowrank_linear", torch.device("cuda"), dtype, 1, 4, weights=frozenset({kind}))
    assert ROW.refuses(call) == reason
