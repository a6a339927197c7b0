from __future__ import annotations

import csv
import io
from dataclasses import replace
from pathlib import Path

import pytest

from grasp.bench.percentiles import Percentiles
from grasp.bench.records import ModelResult, NotMeasured, OpResult
from grasp.bench.results import check_outputs, read_results, save_results
from grasp.bench.tables import comma_separated, markdown
from grasp.errors import GraspError, ResultsError
from tests.bench.records import record

LEFT_OUT = NotMeasured("ops", "cuda", "no CUDA device", op="lowrank_linear", shape="4x6r2", rows=1, dtype="float32")


def test_markdown_has_a_table_for_each_case_and_says_what_was_left_out() -> None:
    lines = [record(OpResult, rows=rows, floor_us=None, provider="a|b") for rows in (1, 16, 1)]
    text = markdown([*lines, LEFT_OUT])
    first, second = text.split("\n\n|")[1:]
    assert first.splitlines()[:3] == [
        " provider | median µs | spread | of floor | × unfused | × dense |",
        "|---|--:|--:|--:|--:|--:|",
        r"| a\|b | 0.5 | 50.0 % | 50.0 % | 0.50 | 0.50 |",
    ]
    assert len(first.partition("\n\n")[0].splitlines()) == 4
    assert len(second.partition("\n\n")[0].splitlines()) == 3
    assert "rows 1; dtype a" in text
    assert OpResult.legend in text
    assert text.endswith("Not measured: cuda lowrank_linear at 4x6r2, M = 1, float32: no CUDA device\n")


def test_the_calls_of_a_workload_are_one_table_the_longest_first() -> None:
    lines = [
        record(OpResult, shape=shape, provider=provider, median_us=us, calls=calls, chosen=provider == "cpu")
        for shape, calls, us in (("4x6r2", 1, 30.0), ("6x4r2", 9, 10.0))
        for provider in ("reference", "cpu", "dense")
    ]
    title, _, table = markdown(lines).partition("\n\n")
    assert "Calls of a workload" in title
    rows = [row.split(" | ") for row in table.split("\n\n")[0].splitlines()[2:]]
    assert [(row[1], row[4], row[5], row[-1]) for row in rows] == [
        ("6x4r2", "9", "cpu", "75.0 % |"),
        ("4x6r2", "1", "cpu", "25.0 % |"),
    ]


def test_a_reason_for_many_shapes_names_some_of_them() -> None:
    lines = [replace(LEFT_OUT, shape=f"4x6r{rank}") for rank in range(1, 15)]
    assert "4x6r12, M = 1, float32; and 2 more shapes: no CUDA device" in markdown(lines)


def test_csv_has_every_field_of_every_record_in_a_column() -> None:
    result = record(ModelResult, prefill_ms=Percentiles(1.0, 2.0, 3.0, p50_interval=(0.5, 1.5)), perplexity=None)
    first, second = csv.DictReader(io.StringIO(comma_separated([result, LEFT_OUT])))
    assert {name.partition(".")[0] for name in first} == {*result.to_dict(), *LEFT_OUT.to_dict()}
    assert (first["kind"], first["prefill_ms.p50"], first["prefill_ms.p50_interval"]) == ("model", "1.0", "[0.5, 1.5]")
    assert (first["perplexity"], first["layers"], first["not_measured"]) == ("", "[1, 2]", "")
    assert (second["kind"], second["conditions.threads"], second["rows"]) == ("not_measured", "", "1")


def test_results_are_saved_as_the_ending_of_each_file_says(tmp_path: Path) -> None:
    paths = [tmp_path / name for name in ("ops.jsonl", "ops.md", "ops.csv")]
    first, second = record(OpResult, rows=1), record(OpResult, rows=16)
    check_outputs(paths)
    save_results(paths, [first])
    save_results(paths, [second], [first])
    assert read_results(paths[0]) == [first, second]
    assert paths[1].read_text() == markdown([first, second])
    assert paths[2].read_text() == comma_separated([first, second])


def test_a_table_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("# hello\n")
    with pytest.raises(ResultsError, match=r"notes\.md exists"):
        check_outputs([tmp_path / "notes.md"])
    with pytest.raises(GraspError, match="there is no folder"):
        check_outputs([tmp_path / "absent" / "ops.csv"])
