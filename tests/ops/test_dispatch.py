from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from grasp_kernels import BackendUnavailableError, available_backends, dispatch, explain, lowrank_linear
from grasp_kernels.dispatch import BACKENDS, CPU_ROWS, DIRECT_GROUPS, OPS, Backend, OpCall

CALL = ("lowrank_linear", torch.device("cpu"), torch.float32, 4, 2)
asked: list[str] = []


def row(
    name: str,
    *,
    missing: str | None = None,
    refuses: str | None = None,
    avoids: str | None = None,
    ops: tuple[str, ...] = OPS,
) -> Backend:
    """A backend with Python's built-in functions: ``select`` only returns them."""

    def ask() -> str | None:
        asked.append(name)
        return missing

    function = "builtins:len" if name == "slow" else "builtins:max"
    return Backend(name, dict.fromkeys(ops, function), ask, lambda _: refuses, lambda _: avoids)


def clear_caches() -> None:
    dispatch._select.cache_clear()
    dispatch.backend_missing.cache_clear()
    asked.clear()


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """Lets a test replace ``BACKENDS``, and clears the cached answers before and after."""
    clear_caches()
    yield monkeypatch
    monkeypatch.undo()
    clear_caches()


def use(table: pytest.MonkeyPatch, *rows: Backend) -> None:
    table.setattr(dispatch, "BACKENDS", rows)


def test_the_reference_is_the_last_row_and_never_refuses() -> None:
    reference = BACKENDS[-1]
    assert reference.name == "reference"
    for op in OPS:
        assert dispatch.objection(reference, OpCall(op, torch.device("cpu"), torch.float64, 10**9, 10**6)) is None


@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_every_row_names_functions_that_exist(backend: Backend) -> None:
    if (reason := dispatch.backend_missing(backend.name)) is not None:
        pytest.skip(f"{backend.name}: {reason}")
    assert set(backend.functions) <= set(OPS)
    for op in backend.functions:
        if dispatch.objection(backend, OpCall(op, *CALL[1:])) is None:
            assert callable(dispatch.select(backend.name, op, *CALL[1:]))


def test_auto_takes_the_first_row_without_an_objection(table: pytest.MonkeyPatch) -> None:
    use(table, row("absent", missing="not built"), row("picky", refuses="too many rows"), row("slow"), row("last"))
    assert dispatch.select("auto", *CALL) is len


def test_auto_passes_over_a_row_that_lacks_the_op(table: pytest.MonkeyPatch) -> None:
    use(table, row("fast", ops=("lowrank_glu",)), row("slow"))
    assert dispatch.select("auto", *CALL) is len
    assert dispatch.select("auto", "lowrank_glu", *CALL[1:]) is max


@pytest.mark.parametrize(
    ("backend", "reason"),
    [
        (row("named", missing="not built"), "not built"),
        (row("named", refuses="too many rows"), "too many rows"),
        (row("named", ops=()), "has no lowrank_linear"),
    ],
    ids=["missing", "refuses", "lacks the op"],
)
def test_a_named_backend_runs_or_raises_with_its_reason(
    table: pytest.MonkeyPatch, backend: Backend, reason: str
) -> None:
    use(table, backend, row("slow"))
    with pytest.raises(BackendUnavailableError, match=f"'named' .*lowrank_linear .*4 rows and rank 2.*{reason}"):
        dispatch.select("named", *CALL)


def test_an_unknown_backend_is_refused_with_the_names_there_are() -> None:
    x, U, Vh = torch.zeros(3, 8), torch.zeros(6, 2), torch.zeros(2, 8)
    names = ", ".join(row.name for row in BACKENDS)
    with pytest.raises(ValueError, match=f"'warp'.*'auto'.*{names}"):
        lowrank_linear(x, U, None, Vh, backend="warp")


def test_whether_a_backend_is_missing_is_asked_once(table: pytest.MonkeyPatch) -> None:
    use(table, row("absent", missing="not built"), row("slow"))
    for rows in range(5):
        dispatch.select("auto", *CALL[:3], rows, 2)
    assert asked == ["absent", "slow"]


def test_prompts_of_any_length_take_few_entries_of_the_cache(table: pytest.MonkeyPatch) -> None:
    use(table, row("slow"))
    for rows in range(5000):
        assert dispatch.select("auto", *CALL[:3], rows, 2) is len
    assert dispatch._select.cache_info().currsize == 65 + 7


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("backend", BACKENDS, ids=lambda backend: backend.name)
def test_the_answers_of_a_row_are_those_of_its_bucket(
    monkeypatch: pytest.MonkeyPatch, backend: Backend, device: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)
    for op in backend.functions:
        for dtype in (torch.float32, torch.bfloat16):
            for rows in range(1, 1100):
                calls = [OpCall(op, torch.device(device), dtype, count, 8) for count in (rows, dispatch.bucket(rows))]
                for answer in (backend.refuses, backend.avoids):
                    assert (answer(calls[0]) is None) == (answer(calls[1]) is None), calls


@pytest.mark.parametrize("capability", [(8, 0), (8, 9)])
def test_triton_refuses_fp8_factors_on_gpus_that_do_not_convert_fp8(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int]
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(dispatch, "_triton_interprets", lambda: False)
    call = OpCall("lowrank_linear", torch.device("cuda"), torch.bfloat16, 1, 8)
    reasons = [
        dispatch._triton_refuses(call._replace(weights=frozenset(weights))) for weights in (["int8", "int4"], ["fp8"])
    ]
    early = "it needs compute capability 8.9 or later for fp8 factors, this card has 8.0"
    assert reasons == [None, early if capability == (8, 0) else None]


def test_available_backends_are_those_the_machine_can_run(table: pytest.MonkeyPatch) -> None:
    use(table, row("absent", missing="not built"), row("picky", refuses="too many rows"), row("slow"))
    assert available_backends() == ("picky", "slow")


def test_explain_says_which_row_runs_and_why_the_others_do_not(table: pytest.MonkeyPatch) -> None:
    use(table, row("absent", missing="not built"), row("picky", refuses="too many rows"), row("slow"), row("last"))
    assert explain("lowrank_linear", rows=4, rank=2) == {
        "absent": "not built",
        "picky": "too many rows",
        "slow": "chosen",
        "last": "not reached",
        "path": "registered op: slow has no direct path",
    }


def test_explain_says_why_a_call_does_not_take_the_direct_path(table: pytest.MonkeyPatch) -> None:
    use(table, row("cpu"))
    most, groups = CPU_ROWS[torch.float32], DIRECT_GROUPS
    answers = [
        explain("lowrank_linear_grouped", rows=most, rank=2, groups=each)["path"] for each in (groups, groups + 1)
    ]
    answers.append(explain("lowrank_glu", rows=4, rank=2)["path"])
    answers.append(explain("lowrank_linear_grouped", rows=most + 1, rank=2)["path"])
    assert [answer.partition(":")[0] for answer in answers] == ["direct", *["registered op"] * 3]
    assert f"at most {groups} groups, not {groups + 1}" in answers[1]
    assert "of cpu has no lowrank_glu" in answers[2]
    assert f"at most {most} rows of torch.float32, not {most + 1}" in answers[3]


def test_explain_agrees_with_auto() -> None:
    for op in OPS:
        answers = explain(op, rows=4, rank=2)
        (chosen,) = (name for name, answer in answers.items() if answer == "chosen")
        assert dispatch.select("auto", op, *CALL[1:]) is dispatch.select(chosen, op, *CALL[1:])


def test_auto_passes_over_calls_that_a_row_avoids_and_a_named_row_runs_them(table: pytest.MonkeyPatch) -> None:
    use(table, row("shy", avoids="slower than it looks"), row("slow"))
    assert dispatch.select("auto", *CALL) is len
    assert dispatch.select("shy", *CALL) is max
    answers = explain("lowrank_linear", rows=4, rank=2)
    assert (answers["shy"], answers["slow"]) == ("slower than it looks", "chosen")


def test_auto_never_picks_the_interpreter_or_a_gpus_kernels_for_the_cpu() -> None:
    for op in OPS:
        answers = explain(op, rows=4, rank=2, device="cpu")
        assert {name for name, answer in answers.items() if answer == "chosen"} <= {"cpu", "reference"}


@pytest.mark.skipif(dispatch.backend_missing("cpu") is not None, reason="not built")
def test_explain_knows_pivoted_and_quantised_factors_and_merged_linears() -> None:
    def chosen(**changes: Any) -> set[str]:
        answers = explain("lowrank_linear_merged", rows=64, rank=8, **changes)
        return {name for name, answer in answers.items() if answer == "chosen"}

    assert chosen() == {"reference"}
    assert chosen(weights=["int8"]) == {"cpu"}
    assert chosen(pivoted=True) == {"cpu"}
    assert "no kernel for fp8" in explain("lowrank_linear", rows=1, rank=1, weights=["fp8"])["cpu"]
    with pytest.raises(ValueError, match="unknown weights 'int3'; expected some of int8, int4, fp8"):
        explain("lowrank_linear", rows=1, rank=1, weights=["int3"])


def test_explain_refuses_an_unknown_op() -> None:
    with pytest.raises(ValueError, match=f"'matmul'.*{', '.join(OPS)}"):
        explain("matmul", rows=1, rank=1)
