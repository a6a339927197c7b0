from __future__ import annotations

import ctypes
import importlib
import importlib.util
import re
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from grasp_kernels import BackendUnavailableError, Factors, cuda, dispatch, lowrank_linear
from grasp_kernels.dispatch import BACKENDS, CUDA_ROWS, OpCall
from tests.definitions import dense_linear
from tests.numerics import assert_accurate
from tests.ops.cuda_cases import CASES, inputs, small
from tests.ops.cuda_emulator import COOPERATIVE, DEPENDENT, Emulator, kinds
from tests.ops.inputs import DTYPES, double, factors, normal, pivoted, seeded
from tests.ops.linears import check_linears
from tests.pairwise import Case, label

# --- the kernels, emulated --------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", CASES, ids=label)
def test_kernels_match_float64(emulator: Emulator, case: Case) -> None:
    x, group = inputs(case)
    emulator.configure(processors=case["processors"], seed=case["seed"])
    outputs = cuda.run(x, [group], path=case["path"])
    expected = {"pair": 0, "dependent": DEPENDENT}
    if case["path"] == "cooperative":
        assert kinds(emulator.finish()) == [("cooperative", COOPERATIVE)]
    else:
        assert kinds(emulator.finish()) == [("shrink", 0), ("expand", expected[case["path"]])]
    check_linears(outputs, x, [group])


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["dependent", "cooperative"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "odd"])
def test_a_group_of_unequal_members_takes_one_pass(
    emulator: Emulator, dtype: torch.dtype, path: str, padded: bool
) -> None:
    generator = seeded()
    x = normal((5, 640), generator, dtype=dtype)
    ranks = (48, 16, 112) if padded else (50, 7, 101)
    groups = [
        factors(N, 640, rank, generator, s=N != 33, bias=N != 16, dtype=dtype)
        for N, rank in zip((130, 33, 16), ranks, strict=True)
    ]
    outputs = cuda.run(x, groups, path=path)
    assert len(emulator.finish()) == (1 if path == "cooperative" else 2)
    check_linears(outputs, x, groups)


@pytest.mark.parametrize("path", ["dependent", "cooperative"])
def test_outputs_may_be_columns_of_one_tensor(emulator: Emulator, path: str) -> None:
    generator = seeded()
    x = normal((5, 640), generator, dtype=torch.bfloat16)
    groups = [factors(N, 640, 16, generator, s=False, bias=True, dtype=torch.bfloat16) for N in (130, 33)]
    whole = x.new_full((5, 3 + 130 + 33), torch.nan)
    check_linears(cuda.run(x, groups, whole[:, 3:].split((130, 33), dim=1), path=path), x, groups)
    assert whole[:, :3].isnan().all()
    check_linears(whole[:, 3:].split((130, 33), dim=1), x, groups)


@pytest.mark.parametrize("path", ["dependent", "cooperative"])
def test_a_group_may_mix_forms_and_takes_no_more_launches(emulator: Emulator, path: str) -> None:
    generator = seeded()
    x = normal((5, 640), generator, dtype=torch.bfloat16)
    groups = [
        pivoted(130, 640, 48, generator, bias=True, dtype=torch.bfloat16),
        factors(40, 640, 16, generator, s=True, bias=True, dtype=torch.bfloat16),
        pivoted(65, 640, 64, generator, dtype=torch.bfloat16),
    ]
    whole = x.new_full((5, 3 + 130 + 40 + 65), torch.nan)
    outputs = cuda.run(x, groups, whole[:, 3:].split((130, 40, 65), dim=1), path=path)
    assert len(emulator.finish()) == (1 if path == "cooperative" else 2)
    assert whole[:, :3].isnan().all()
    check_linears(outputs, x, groups)


@pytest.mark.parametrize("place", [0, 47, 48, 129])  # the first and the last pivot and row of U
@pytest.mark.parametrize("entry", [-1, 130])
def test_nothing_is_written_for_an_order_out_of_range(emulator: Emulator, place: int, entry: int) -> None:
    generator = seeded()
    x = normal((2, 64), generator, dtype=torch.bfloat16)
    group = pivoted(130, 64, 48, generator, bias=True, dtype=torch.bfloat16)
    assert group.order is not None
    left_out = int(group.order[place])
    group.order[place] = entry
    y = x.new_full((2, 130), torch.nan)
    cuda.run(x, [group], [y])
    emulator.finish()
    assert y.isnan().all(0).nonzero().flatten().tolist() == [left_out]


def test_a_group_of_more_than_eight_takes_several(emulator: Emulator) -> None:
    generator = seeded()
    x = normal((2, 64), generator, dtype=torch.bfloat16)
    groups = [factors(8 + n, 64, 1 + n, generator, s=True, bias=True, dtype=torch.bfloat16) for n in range(11)]
    outputs = cuda.run(x, groups)
    assert kinds(emulator.finish()) == 2 * [("shrink", 0), ("expand", DEPENDENT)]
    check_linears(outputs, x, groups)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_every_number_of_splits_gives_the_result(emulator: Emulator, dtype: torch.dtype, rows: int) -> None:
    generator = seeded()
    x = normal((rows, 512 * 8), generator, dtype=dtype)
    group = factors(32, 512 * 8, 16, generator, s=True, bias=True, dtype=dtype)
    blocks = set()
    for splits in range(1, 10):
        emulator.configure()
        outputs = cuda.run(x, [group], splits=splits)
        blocks.add(emulator.finish()[0].blocks)
        check_linears(outputs, x, [group])
    assert blocks == {1, 2, 3, 4} | ({8} if rows == 1 else set()) | (
        {6} if (rows, dtype) == (1, torch.float32) else set()
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_runs_agree_bit_for_bit_on_every_path_and_in_every_order(emulator: Emulator, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((7, 2048), generator, dtype=dtype)
    group = factors(96, 2048, 48, generator, s=True, bias=True, dtype=dtype)
    results = []
    for path in ("pair", "dependent", "cooperative"):
        for seed in range(3):
            emulator.configure(seed=seed)
            results.append(cuda.run(x, [group], path=path)[0])
            emulator.finish()
    assert all(torch.equal(result, results[0]) for result in results)


def test_the_barrier_is_ready_for_the_next_launch_of_any_size(emulator: Emulator) -> None:
    generator = seeded()
    words = []
    for N in (200, 16, 90, 200, 33):
        emulator.configure(seed=N)
        x = normal((3, 1024), generator, dtype=torch.bfloat16)
        group = factors(N, 1024, 32, generator, s=False, bias=True, dtype=torch.bfloat16)
        outputs = cuda.run(x, [group], path="cooperative")
        emulator.finish()
        check_linears(outputs, x, [group])
        words.append(emulator.barrier.item() & 0xFFFFFFFF)
    assert words == [1 << 30, 2 << 30, 3 << 30, 0, 1 << 30]  # one bit flips; the bits above it wrap, those below stay 0


def test_a_cooperative_grid_never_exceeds_the_card(emulator: Emulator) -> None:
    generator = seeded()
    x = normal((1, 64), generator, dtype=torch.bfloat16)
    group = factors(1000, 64, 16, generator, s=False, bias=False, dtype=torch.bfloat16)
    emulator.configure(processors=2, occupancy=3)
    outputs = cuda.run(x, [group], path="cooperative")
    assert [launch.blocks for launch in emulator.finish()] == [6]
    check_linears(outputs, x, [group])


def test_h_times_s_beyond_the_range_of_fp16_does_not_overflow(emulator: Emulator) -> None:
    generator = seeded()
    x = normal((2, 128), generator, dtype=torch.float16, scale=100.0)
    group = factors(64, 128, 16, generator, s=True, bias=False, dtype=torch.float16)
    group = group._replace(U=(group.U.float() * 1e-4).half(), s=group.s * 1e4)
    (y,) = cuda.run(x, [group])
    emulator.finish()
    exact = dense_linear(x.double(), double(group))
    assert (x.double() @ group.Vh.double().mT * group.s).abs().max() > torch.finfo(torch.float16).max
    assert_accurate("linear", torch.float16, y, exact.half(), exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_affect_only_their_own_outputs(emulator: Emulator, dtype: torch.dtype) -> None:
    x = torch.ones(2, 64, dtype=dtype)
    x[1, 3] = torch.inf
    group = Factors(torch.ones(8, 1, dtype=dtype), None, torch.ones(1, 64, dtype=dtype))
    (y,) = cuda.run(x, [group])
    emulator.finish()
    assert y[0].tolist() == [64.0] * 8
    assert y[1].tolist() == [torch.inf] * 8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", ["pair", "cooperative"])
def test_aligned_rows_may_have_any_length(emulator: Emulator, dtype: torch.dtype, path: str) -> None:
    generator = seeded()
    x = normal((3, 64), generator, dtype=dtype)[:, :61]
    group = factors(40, 64, 16, generator, s=True, bias=True, dtype=dtype)
    group = Factors(group.U[:, :13], group.s[:13], group.Vh[:13, :61], group.bias)
    outputs = cuda.run(x, [group], path=path)
    emulator.finish()
    check_linears(outputs, x, [group])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shifted", ["x", "U", "Vh"])
def test_a_matrix_may_start_anywhere(emulator: Emulator, dtype: torch.dtype, shifted: str) -> None:
    def moved(name: str, tensor: Tensor) -> Tensor:
        if name != shifted:
            return tensor
        return torch.cat([tensor.new_full((1,), torch.nan), tensor.flatten()])[1:].view(tensor.shape)

    generator = seeded()
    x = moved("x", normal((3, 64), generator, dtype=dtype))
    group = factors(40, 64, 16, generator, s=True, bias=True, dtype=dtype)
    group = group._replace(U=moved("U", group.U), Vh=moved("Vh", group.Vh))
    outputs = cuda.run(x, [group])
    emulator.finish()
    check_linears(outputs, x, [group])


def test_without_rows_nothing_is_launched(emulator: Emulator) -> None:
    group = factors(24, 64, 5, seeded(), s=True, bias=True, dtype=torch.float32)
    (y,) = cuda.run(torch.empty(0, 64), [group])
    assert y.shape == (0, 24)
    assert emulator.finish() == []


# --- the row of the table ---------------------------------------------------------------------------------------------

ROW = next(row for row in BACKENDS if row.name == "cuda")


def test_it_is_the_first_row_and_runs_the_linears() -> None:
    assert BACKENDS[0] is ROW
    assert set(ROW.functions) == {"lowrank_linear", "lowrank_linear_grouped"}


def test_its_row_limit_is_that_of_the_header(emulator: Emulator) -> None:
    assert emulator.module.MAX_ROWS == CUDA_ROWS


@pytest.mark.parametrize(
    ("device", "dtype", "rows", "named"),
    [
        ("cpu", torch.bfloat16, 1, "not on cpu"),
        ("cuda", torch.float64, 1, "float32"),
        ("cuda", torch.bfloat16, CUDA_ROWS + 1, "at most 16 rows"),
        ("cuda", torch.bfloat16, CUDA_ROWS, None),
        ("cuda", torch.float16, 0, None),
    ],
)
def test_calls_that_it_refuses(
    monkeypatch: pytest.MonkeyPatch, device: str, dtype: torch.dtype, rows: int, named: str | None
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    reason = ROW.refuses(OpCall("lowrank_linear", torch.device(device), dtype, rows, 4))
    assert reason is None if named is None else reason is not None and named in reason


@pytest.mark.parametrize(
    ("triton", "dtype", "most"),
    [
        (None, torch.bfloat16, 4),
        (None, torch.float32, CUDA_ROWS),  # triton multiplies without tensor cores too
        ("Triton is not installed", torch.bfloat16, CUDA_ROWS),
    ],
)
def test_auto_gives_it_few_rows_if_triton_is_there_and_all_it_serves_otherwise(
    monkeypatch: pytest.MonkeyPatch, triton: str | None, dtype: torch.dtype, most: int
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)
    monkeypatch.setattr(dispatch, "backend_missing", lambda name: triton if name == "triton" else None)
    calls = [OpCall("lowrank_linear", torch.device("cuda"), dtype, rows, 4) for rows in range(CUDA_ROWS + 4)]
    auto = [call.rows for call in calls if dispatch.objection(ROW, call, named=False) is None]
    assert auto == list(range(most + 1))
    assert dispatch.objection(ROW, calls[CUDA_ROWS]) is None


def test_auto_passes_over_quantised_factors_that_it_would_read_byte_by_byte(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)

    def objections(triton: str | None) -> list[bool]:
        monkeypatch.setattr(dispatch, "backend_missing", lambda name: triton if name == "triton" else None)
        calls = [
            OpCall("lowrank_linear", torch.device("cuda"), torch.bfloat16, 1, rank, weights=frozenset({"int4"}))
            for rank in (96, 97)
        ]
        return [dispatch.objection(ROW, call, named=False) is not None for call in calls]

    assert objections(None) == [False, True]
    assert objections("Triton is not installed") == [False, False]


def test_it_refuses_an_older_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    reason = ROW.refuses(OpCall("lowrank_linear", torch.device("cuda"), torch.float16, 1, 4))
    assert reason is not None
    assert "8.0" in reason
    assert "7.5" in reason


def test_the_reasons_why_a_machine_cannot_run_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("undefined symbol")

    monkeypatch.setattr(torch.version, "cuda", None)
    assert "no CUDA GPU" in (ROW.missing() or "")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA GPU" in (ROW.missing() or "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "nvcc" in (ROW.missing() or "")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(importlib, "import_module", broken)
    assert "undefined symbol" in (ROW.missing() or "")
    monkeypatch.setattr(importlib, "import_module", lambda name: object())
    assert ROW.missing() is None


@pytest.mark.parametrize(("driver", "loads"), [(0, True), (12090, False), (13000, True), (14000, True)])
def test_a_driver_of_an_earlier_cuda_is_a_reason_to_do_without(emulator: Emulator, driver: int, loads: bool) -> None:
    """A wheel may meet a driver that is older than the CUDA with which it was built."""
    version = ctypes.c_int.in_dll(emulator.library, "emulator_driver")
    spec = importlib.util.spec_from_file_location(f"driver_{driver}._cuda", emulator.module.__file__)
    assert spec is not None
    assert spec.loader is not None
    old = pytest.raises(ImportError, match=r"built with CUDA 13\.1, .* driver is for CUDA 12\.9")
    version.value = driver
    try:
        with nullcontext() if loads else old:
            spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        version.value = 0


def test_a_named_backend_that_is_missing_raises_with_the_reason() -> None:
    if (reason := dispatch.backend_missing("cuda")) is None:
        pytest.skip("this machine runs it")
    x, (group,) = small()
    with pytest.raises(BackendUnavailableError, match=f"backend 'cuda' .*{re.escape(reason)}"):
        lowrank_linear(x, *group, backend="cuda")
