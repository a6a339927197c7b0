from __future__ import annotations

import pytest

from grasp.bench.records import ModelResult, OpResult
from grasp.cli.bench_tables import show_results
from tests.bench.records import record


def tables(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.strip().split("\n\n")


def test_columns_that_do_not_fit_follow_below_with_the_first_column_repeated(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    show_results([record(ModelResult, provider="compressed/reference", dtype_bytes={"int8": 5, "bfloat16": 3})])
    parts = tables(capsys)
    assert len(parts) > 1
    assert all("compressed/reference" in part for part in parts)
    assert "model a" in parts[0]
    assert not any("model a" in part for part in parts[1:])
    assert all(len(line) <= 80 for part in parts for line in part.splitlines())
    shown = " ".join(" ".join(parts).split())
    assert all(column.heading in shown for column in ModelResult.columns)


def test_cases_have_a_table_each_and_blank_columns_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    show_results([record(OpResult, rows=rows, floor_us=None) for rows in (1, 16, 1)])
    first, second = tables(capsys)
    assert "rows 1; dtype a" in first
    assert "rows 16; dtype a" in second
    assert len(first.splitlines()) == len(second.splitlines()) + 1
    assert "floor µs" not in first
