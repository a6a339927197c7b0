from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel
from typer.testing import Result

from benchmarks.study import quality
from benchmarks.study.ledger import Ledger
from benchmarks.study.methods import METHODS, Job, Outcome
from benchmarks.study.quality import Cell, kinds_table, main, missing
from benchmarks.study.records import STUDY_RECORDS
from grasp.bench.results import read_results
from grasp.calibration import builtin_kinds
from tests.command_line import run_script, save_tiny_model

WHOLE_LAYERS = ("layers removed", "linear replacement", "best", "best, recovered")  # methods that may remove them


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model")


def run(model: Path, output: Path, *arguments: str) -> Result:
    text = model.parent / "text.txt"
    text.write_text("".join(f"line {n} of a text\n" for n in range(300)), encoding="utf-8")
    sizes = ["--num-samples", "4", "--seq-len", "32", "--window", "32", "--windows", "4", "--batch-size", "1"]
    sources = ["--calibration", text, "--text", text, "--cache", output.parent / "cache"]
    return run_script(main, "-o", output, "--model", model, *sizes, *sources, *arguments)


def cells(output: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def test_every_method_gives_a_cell_with_its_size_and_its_excess(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.jsonl"
    result = run(model, output, "--ratios", "0.3", "--seeds", "1")
    assert result.exit_code == 0, result.output
    by_method = {str(cell["method"]): cell for cell in cells(output)}
    assert by_method.keys() == {"dense", *METHODS}
    assert by_method["dense"]["removed"] == by_method["dense"]["excess"] == 0
    for method in METHODS:
        least = 0.27  # tiny matrices: a whole rank is much
        assert least <= float(str(by_method[method]["removed"])) <= (0.34 if method in WHOLE_LAYERS else 0.31), method
        assert by_method[method]["excess"] != 0
        assert by_method[method]["peak_bytes"] is not None
        assert bool(by_method[method]["held_out_loss"]) == (method in {"best", "best, recovered"})
    by_key = {(c.method, c.ratio, c.seed): c for c in read_results(output, STUDY_RECORDS) if isinstance(c, Cell)}
    best, dense = by_key["best", 0.3, 1].kind_losses, by_key["dense", 0.0, 0].kind_losses
    excess = {kind: best[kind] - dense[kind] for kind in builtin_kinds("evaluation")}
    worst = max(excess, key=excess.__getitem__)
    expected = [f"{sum(excess.values()) / len(excess):.3f}", f"{excess[worst]:.3f}", worst]
    row = [[*column.cells][[*METHODS].index("best")] for column in kinds_table(by_key).columns]
    assert row[2:] == expected
    assert str(tmp_path) not in json.dumps([cell["setting"] | {"model": ""} for cell in by_method.values()])  # type: ignore[operator]


def test_a_study_is_continued_cell_by_cell(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "study.jsonl"
    options = ("--methods", "GRASP, one sweep", "--methods", "plain SVD", "--ratios", "0.3", "--seeds", "0")
    assert run(model, output, *options).exit_code == 0
    before = output.read_text(encoding="utf-8")
    ran: list[tuple[str, int]] = []
    original = quality.Study.cell

    def counted(self: quality.Study, method: str, ratio: float, seed: int, *rest: Any) -> quality.Cell:
        ran.append((method, seed))
        return original(self, method, ratio, seed, *rest)

    monkeypatch.setattr(quality.Study, "cell", counted)
    result = run(model, output, *options, "--seeds", "1")
    assert result.exit_code == 0, result.output
    assert ran == [("GRASP, one sweep", 1), ("plain SVD", 1)]
    assert output.read_text(encoding="utf-8").startswith(before)
    assert " ± " in result.output


def test_what_other_code_has_computed_is_not_used(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "root" / "grasp" / "compress.py"
    source.parent.mkdir(parents=True)
    monkeypatch.setattr(quality, "ROOT", tmp_path / "root")
    for folders, code in enumerate(["a = 1", "a = 2"], start=1):
        source.write_text(code)
        output = tmp_path / f"{folders}.jsonl"
        result = run(model, output, "--methods", "plain SVD", "--ratios", "0.3", "--seeds", "0")
        assert result.exit_code == 0, result.output
        assert len([*(tmp_path / "cache").iterdir()]) == folders


def test_each_cell_compresses_a_dense_model_of_its_own_in_the_dtype_of_the_weights(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[torch.dtype, float]] = []

    def zero_(model: PreTrainedModel, job: Job) -> Outcome:
        weight = next(model.parameters()).data
        seen.append((weight.dtype, float(weight.abs().sum())))
        weight.zero_()
        return Outcome()

    monkeypatch.setitem(METHODS, "plain SVD", zero_)
    dtypes = ("--weights", "bfloat16", "--dtype", "bfloat16")
    options = ("--methods", "plain SVD", "--ratios", "0.1", "--ratios", "0.3", "--seeds", "0", *dtypes)
    result = run(model, tmp_path / "study.jsonl", *options)
    assert result.exit_code == 0, result.output
    assert [dtype for dtype, _ in seen] == [torch.bfloat16] * 2
    assert seen[0] == seen[1]
    assert seen[0][1] > 0


def test_an_interrupted_compression_is_resumed(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--methods", "best", "--ratios", "0.3", "--seeds", "0", "--memory", "0.5GB")
    whole, parts = (tmp_path / name / "study.jsonl" for name in ("whole", "parts"))
    for output in (whole, parts):
        output.parent.mkdir()
    assert run(model, whole, *options).exit_code == 0
    steps: list[str] = []
    note = Ledger.note

    def interrupt(self: Ledger, step: str, done: int, total: int, *, besides: float = 0.0) -> None:
        note(self, step, done, total, besides=besides)
        steps.append(step)
        if steps.count("refit") == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(Ledger, "note", interrupt)
    assert run(model, parts, *options).exit_code != 0
    assert steps.pop() == "refit"
    assert "decompositions" in steps
    steps = ["refit"] * 2
    assert run(model, parts, *options).exit_code == 0
    assert "decompositions" not in steps
    expected, resumed = (cells(output)[-1] for output in (whole, parts))
    assert resumed["perplexity"] == expected["perplexity"]
    assert resumed["ranks"] == expected["ranks"]
    assert resumed["memory"] == 5e8
    assert resumed["pivoted"]
    assert not list(parts.parent.rglob("best*"))


def test_tasks_are_measured_where_they_are_asked_for(model: Path, tmp_path: Path) -> None:
    question = {"query": "Question: is it?\nAnswer:", "choices": ["yes", "no it is not"], "gold": 0}
    (tmp_path / "piqa.jsonl").write_text(f"{json.dumps(question)}\n" * 3, encoding="utf-8")
    output = tmp_path / "study.jsonl"
    options = ("--methods", "plain SVD", "--ratios", "0.3", "--seeds", "0")
    tasks = ("--tasks", "piqa", "--tasks-from", str(tmp_path), "--limit", "2")
    result = run(model, output, *options, *tasks)
    assert result.exit_code == 0, result.output
    assert [cell["accuracy"] for cell in cells(output)] in ([{"piqa": a}, {"piqa": b}] for a in (0, 1) for b in (0, 1))
    assert "accuracy" in result.output
    assert run(model, output, *options).exit_code == 2  # one without tasks is another study


def test_a_file_of_another_study_is_refused_and_left_as_it_is(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.jsonl"
    options = ("--methods", "plain SVD", "--ratios", "0.3", "--seeds", "1")
    assert run(model, output, *options).exit_code == 0
    before = output.read_text(encoding="utf-8")
    result = run(model, output, *options, "--windows", "2")
    assert result.exit_code == 2
    assert "give another file" in " ".join(result.output.split())
    assert output.read_text(encoding="utf-8") == before


def test_a_damaged_line_is_named(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "study.jsonl"
    output.write_text('{"method": "GRASP"}\n', encoding="utf-8")
    result = run(model, output)
    assert result.exit_code == 2
    assert "line 1" in " ".join(result.output.split())


def test_an_unknown_method_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "study.jsonl", "--methods", "magic")
    assert result.exit_code == 2
    assert not (tmp_path / "study.jsonl").exists()


def test_seeds_come_one_after_the_other() -> None:
    order = list(missing({}, ["a", "b"], [0.1, 0.2], [0, 1]))
    assert order[:4] == [("a", 0.1, 0), ("b", 0.1, 0), ("a", 0.2, 0), ("b", 0.2, 0)]
    assert len(order) == 8
