from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grasp_kernels import BackendUnavailableError, Factors, cpu, explain, lowrank_linear
from grasp_kernels.dispatch import CPU_ROWS, CPU_ROWS_QUANTIZED, backend_missing
from tests.definitions import glu
from tests.numerics import assert_accurate
from tests.ops.inputs import DTYPES, LAYOUTS, double, factors, normal, seeded
from tests.ops.linears import check_linear
from tests.pairwise import Case, label, pairwise

if (reason := backend_missing("cpu")) is not None:
    pytest.skip(reason, allow_module_level=True)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
INSTRUCTION_SETS = [name for name in cpu.INSTRUCTION_SETS if cpu.supports(name)]
# Both sides of the limits between kernels, and of the end of a vector and of a panel.
CASES = pairwise(
    instruction_set=INSTRUCTION_SETS,
    dtype=DTYPES,
    rows=(1, 2, 3, 4, 5, 8, 9, 16, 17, 33, 64, 70, 0),
    K=(63, 128, 1, 700, 520),
    N=(70, 16, 1, 33),
    rank=(21, 1, 64, 300, 5),
    layout=LAYOUTS,
    threads=(1, 2),
    extras=("s and bias", "bias", "s", "neither"),
)


@pytest.mark.parametrize("case", CASES, ids=label)
def test_every_instruction_set_matches_float64(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = seeded()
    options = {"dtype": case["dtype"], "layout": case["layout"]}
    x = normal((case["rows"], case["K"]), generator, **options)
    extras = {"s": "s" in case["extras"].split(), "bias": "bias" in case["extras"]}
    group = factors(case["N"], case["K"], case["rank"], generator, **extras, **options)
    monkeypatch.setattr(torch, "get_num_threads", lambda: case["threads"])
    (y,) = cpu.run(x, [group], instruction_set=case["instruction_set"])
    check_linear(y, x, group)


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_groups_of_unequal_members(instruction_set: str, dtype: torch.dtype, rows: int) -> None:
    generator = seeded()
    x = normal((rows, 300), generator, dtype=dtype)
    groups = [
        factors(N, 300, rank, generator, s=N == 16, bias=N != 16, dtype=dtype)
        for N, rank in ((130, 33), (16, 64), (1, 1), (90, 130))
    ]
    for y, group in zip(cpu.run(x, groups, instruction_set=instruction_set), groups, strict=True):
        check_linear(y, x, group)


@pytest.mark.parametrize("rows", [1, 6, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_tanh", "relu"])
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_gated_units(instruction_set: str, activation: str, dtype: torch.dtype, rows: int) -> None:
    generator = seeded()
    x = normal((rows, 96), generator, dtype=dtype, scale=2)
    gate, up = (factors(70, 96, rank, generator, s=True, bias=True, dtype=dtype) for rank in (20, 33))
    (y,) = cpu.run(x, [gate, up], activation=activation, instruction_set=instruction_set)
    exact = glu(x.double(), double(gate), double(up), activation)
    assert_accurate("linear", dtype, y, glu(x, gate, up, activation), exact)


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_activations_are_right_far_from_zero(instruction_set: str) -> None:
    x = torch.tensor([[-1e30, -200.0, -88.0, -20.0, -1e-30, 0.0, 1e-30, 20.0, 88.0, 200.0, 1e18]]).mT
    one = Factors(torch.ones(1, 1), None, torch.ones(1, 1), None)
    constant = Factors(torch.ones(1, 1), None, torch.zeros(1, 1), torch.ones(1))
    for activation, function in (("silu", torch.nn.functional.silu), ("gelu", torch.nn.functional.gelu)):
        (y,) = cpu.run(x, [one, constant], activation=activation, instruction_set=instruction_set)
        torch.testing.assert_close(y, function(x.double()).float(), rtol=3e-6, atol=1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_infinities_and_nans_affect_only_their_row_and_column(instruction_set: str, dtype: torch.dtype) -> None:
    generator = seeded()
    for rows in (3, 12):
        x = normal((rows, 45), generator, dtype=dtype)
        group = factors(50, 45, 35, generator, s=False, bias=False, dtype=dtype)
        x[1, 44] = torch.nan
        group.U[7, 34] = torch.inf
        (y,) = cpu.run(x, [group], instruction_set=instruction_set)
        expected = torch.ones(rows, 50, dtype=torch.bool)
        expected[1], expected[:, 7] = False, False
        assert torch.equal(y.isfinite(), expected)
        assert y[1].isnan().all()


@pytest.mark.parametrize("instruction_set", INSTRUCTION_SETS)
def test_subnormal_elements_give_correct_results(instruction_set: str) -> None:
    generator = seeded()
    for rows in (1, 12):
        x = normal((rows, 200), generator, dtype=torch.bfloat16)
        group = factors(60, 200, 40, generator, s=True, bias=False, dtype=torch.bfloat16)
        x[:, ::3] *= 1e-39
        group.Vh[:, 1::3] *= 1e-39
        check_linear(cpu.run(x, [group], instruction_set=instruction_set)[0], x, group)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unaligned_and_overlapping_memory(dtype: torch.dtype) -> None:
    generator = seeded()
    storage = normal((2000,), generator, dtype=dtype, scale=0.1)
    group = Factors(storage[1:421].view(60, 7), None, storage[3:703].view(7, 100), storage[5:65])
    x = storage[7:507].as_strided((5, 100), (1, 1))  # rows that overlap
    for inputs in (x, storage[9:109].expand(3, 100), storage[9:1009:10].view(1, 100)):
        check_linear(lowrank_linear(inputs, *group, backend="cpu"), inputs, group)
    overlapping = Factors(storage.as_strided((60, 7), (1, 1)), None, storage[:7, None].expand(7, 100), None)
    check_linear(lowrank_linear(x, *overlapping, backend="cpu"), x, overlapping)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 16])
def test_the_result_does_not_depend_on_the_number_of_threads(rows: int, dtype: torch.dtype) -> None:
    generator = seeded()
    x = normal((rows, 1000), generator, dtype=dtype)
    group = factors(900, 1000, 150, generator, s=True, bias=True, dtype=dtype)
    both = lowrank_linear(x, *group, backend="cpu")
    torch.set_num_threads(1)
    assert torch.equal(both, lowrank_linear(x, *group, backend="cpu"))


@pytest.mark.usefixtures("two_threads")
def test_concurrent_callers_get_correct_results() -> None:
    generator = seeded()
    calls = []
    for caller in range(6):
        dtype = DTYPES[caller % 3]
        x = normal((1 + 7 * caller, 600), generator, dtype=dtype)
        group = factors(500, 600, 130, generator, s=True, bias=True, dtype=dtype)
        calls.append((x, group, lowrank_linear(x, *group, backend="cpu")))
    wrong = []

    def call(x: Tensor, group: Factors, expected: Tensor) -> None:
        for _ in range(40):
            if not torch.equal(lowrank_linear(x, *group, backend="cpu"), expected):
                wrong.append(x.shape)

    threads = [threading.Thread(target=call, args=arguments) for arguments in calls]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_other_python_threads_run_during_a_call() -> None:
    generator = seeded()
    x = normal((2000, 2000), generator, dtype=torch.float32)
    group = factors(2000, 2000, 400, generator, s=False, bias=False, dtype=torch.float32)
    thread = threading.Thread(target=lambda: cpu.run(x, [group]))
    thread.start()
    turns = 0
    while thread.is_alive():
        time.sleep(0.001)
        turns += 1
    assert turns > 5


def test_calls_do_not_leak_memory() -> None:
    generator = seeded()
    x = normal((1, 64), generator, dtype=torch.bfloat16)
    group = factors(32, 64, 8, generator, s=True, bias=True, dtype=torch.bfloat16, layout="transposed")

    def resident_bytes(calls: int) -> int:
        for _ in range(calls):
            cpu.run(x, [group])
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    before = resident_bytes(1000)
    assert resident_bytes(100_000) - before < 2 << 20


def test_a_missing_instruction_set_is_an_error_and_not_a_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(cpu.INSTRUCTION_SETS, "of tomorrow", 6)
    assert not cpu.supports("of tomorrow")
    group = factors(4, 8, 2, seeded(), s=False, bias=False, dtype=torch.float32)
    with pytest.raises(ValueError, match=r"lowrank\.h"):
        cpu.run(torch.ones(1, 8), [group], instruction_set="of tomorrow")
    for name in set(cpu.INSTRUCTION_SETS) - set(INSTRUCTION_SETS) - {"of tomorrow"}:
        with pytest.raises(RuntimeError, match="instruction set"):
            cpu.run(torch.ones(1, 8), [group], instruction_set=name)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_auto_uses_pytorch_for_many_rows_and_the_named_backend_still_runs(dtype: torch.dtype) -> None:
    many = CPU_ROWS[dtype] + 1
    for rows, weights in ((CPU_ROWS, ()), (CPU_ROWS_QUANTIZED, ("int4",))):
        few = rows[dtype]
        assert explain("lowrank_linear", rows=few, rank=8, dtype=dtype, weights=weights)["cpu"] == "chosen"
        answers = explain("lowrank_linear", rows=few + 1, rank=8, dtype=dtype, weights=weights)
        assert f"{few} rows" in answers["cpu"]
        assert answers["reference"] == "chosen"
    generator = seeded()
    x = normal((many, 40), generator, dtype=dtype)
    group = factors(30, 40, 8, generator, s=False, bias=True, dtype=dtype)
    check_linear(lowrank_linear(x, *group, backend="cpu"), x, group)


def test_float64_is_refused_by_name() -> None:
    group = factors(4, 8, 2, seeded(), s=False, bias=False)
    with pytest.raises(BackendUnavailableError, match="float32"):
        lowrank_linear(torch.ones(1, 8, dtype=torch.float64), *group, backend="cpu")


def test_the_compiled_module_refuses_tensors_that_do_not_agree() -> None:
    x, U, s, Vh, bias = torch.zeros(3, 8), torch.zeros(6, 2), torch.ones(2), torch.zeros(2, 8), torch.zeros(6)
    calls = [
        (x, (U, s[:1], Vh, bias), torch.zeros(3, 6)),
        (x, (U, s[:0], Vh, bias), torch.zeros(3, 6)),
        (x, (U, s.half(), Vh, bias), torch.zeros(3, 6)),
        (x, (U, s, Vh, bias[:5]), torch.zeros(3, 6)),
        (x, (U, s, Vh, bias[:0]), torch.zeros(3, 6)),
        (x, (U.half(), s, Vh, bias), torch.zeros(3, 6)),
        (x, (U, s, Vh[:1], bias), torch.zeros(3, 6)),
        (x, (U, s, Vh[:, :7], bias), torch.zeros(3, 6)),
        (x, (U, s, Vh, bias), torch.zeros(2, 6)),
        (x, (U, s, Vh, bias), torch.zeros(3, 5)),
        (x, (U, s, Vh, bias), torch.zeros(3, 6).half()),
    ]
    for x, group, y in calls:
        with pytest.raises(ValueError, match="do not agree"):
            cpu._module().run(x, (Factors(*group),), (y,), cpu._UNGATED, 1, cpu.INSTRUCTION_SETS["auto"])


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_an_empty_factor_may_have_any_strides(backend: str) -> None:
    x, (_, _, Vh, bias, *_) = normal((2, 40), seeded()), factors(6, 40, 6, seeded(), s=False, bias=True)
    x, Vh, bias = x.float(), Vh.float(), bias.float()
    U = torch.ones(24, 12)[:0, ::2]  # of full rank; PyTorch's copies have its strides
    y = lowrank_linear(x, U, None, Vh, bias, torch.arange(6, dtype=torch.int32), backend=backend)
    torch.testing.assert_close(y, x @ Vh.mT + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["U", "s", "Vh", "bias"])
def test_freed_memory_is_refused(name: str) -> None:
    group = factors(24, 40, 6, seeded(), s=True, bias=True, dtype=torch.float32)
    getattr(group, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match=r"do not agree|pointer"):
        lowrank_linear(torch.ones(1, 40), *group, backend="cpu")
