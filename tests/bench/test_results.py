from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import fields, is_dataclass
from inspect import cleandoc
from pathlib import Path

import pytest

from benchmarks.study.records import STUDY_RECORDS, StudySetting
from grasp.bench.conditions import Conditions
from grasp.bench.percentiles import Percentiles
from grasp.bench.records import RECORDS, ModelResult, OpResult
from grasp.bench.results import append_results, check_output, read_results
from grasp.bench.schema import Record
from grasp.errors import GraspError, ResultsError
from tests.bench.records import record
from tests.command_line import ROOT

RESULTS = ROOT / "benchmarks" / "results"
WITHOUT_SCHEMA = {
    f"{name}-cpu-amd-epyc.jsonl" for name in ("decompositions", "growth", "processes", "statistics", "vllm")
}


def line(record_class: type[Record], /, **changes: object) -> str:
    return json.dumps({**record(record_class).to_dict(), **changes})


def test_what_was_written_is_read_back_typed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    written = [record(record_class) for record_class in RECORDS]
    append_results(path, written[:2])
    append_results(path, written[2:])
    append_results(path, [])
    assert read_results(path) == written


@pytest.mark.parametrize("path", sorted(RESULTS.glob("*.jsonl")), ids=lambda path: path.name)
def test_published_results_are_read(path: Path) -> None:
    if path.name in WITHOUT_SCHEMA:
        with pytest.raises(ResultsError, match="line 1: got kind None"):
            read_results(path)
    else:
        assert len(read_results(path, STUDY_RECORDS)) == len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.slow
def test_results_are_read_without_matplotlib() -> None:
    code = "import sys; sys.modules['matplotlib'] = None; from grasp.bench.results import read_results"
    path = os.pathsep.join([str(ROOT / "kernels"), str(ROOT)])
    subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, check=True)


def test_a_line_names_its_kind_and_its_schema_first() -> None:
    for record_class in RECORDS:
        start = list(record(record_class).to_dict().items())[:2]
        assert start == [("kind", record_class.kind), ("schema_version", record_class.schema_version)]


def test_none_survives_where_the_schema_has_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    result = record(ModelResult, perplexity=None, backend=None)
    append_results(path, [result])
    (read,) = read_results(path)
    assert isinstance(read, ModelResult)
    assert (read.perplexity, read.backend) == (None, None)
    assert read == result


def test_an_integer_is_read_as_the_float_that_the_schema_has(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line(OpResult, median_us=7) + "\n\n")
    assert type(read_results(path)[0].median_us) is float  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "op", "schema', "line 2: it is not JSON"),
        ("[1]", "line 2: it is a JSON list, not an object; expected an object of kind model, op"),
        ('{"op": "lowrank_linear"}', "line 2: got kind None"),
        (line(OpResult, kind="speed"), "line 2: got kind 'speed'; expected kind model, op"),
        (line(OpResult, schema_version=99), "line 2: got schema_version 99 of kind 'op'; expected 1"),
        (line(OpResult, median_us="fast"), "line 2: op.median_us is 'fast'; expected float"),
        (line(OpResult, rows=True), "line 2: op.rows is True; expected int"),
        (line(OpResult, rows=None), "line 2: op.rows is None; expected int"),
        (line(OpResult, colour=3), "line 2: op has the unknown field 'colour'"),
        (line(ModelResult, layers=[1, "two"]), r"line 2: model.layers\[1\] is 'two'; expected int"),
        (line(ModelResult, prefill_ms={"p50": 1}), "line 2: model.prefill_ms lacks the field 'p95'"),
        (line(ModelResult, prefill_ms=3), "line 2: model.prefill_ms is 3; expected an object"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_number(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line(OpResult) + "\n" + text + "\n")
    with pytest.raises(ResultsError, match=re.escape(str(path)) + ", " + message):
        read_results(path)


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ResultsError, match="; expected JSON lines of results"):
            read_results(tmp_path / name)


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results(tmp_path / "results.jsonl", [record(OpResult), record(OpResult, median_us=float("nan"))])
    assert not (tmp_path / "results.jsonl").exists()


def test_a_last_line_without_an_end_is_given_one(tmp_path: Path) -> None:
    path, one = tmp_path / "results.jsonl", record(OpResult)
    append_results(path, [one])
    path.write_text(path.read_text().rstrip("\n"))
    append_results(path, [one])
    append_results(path, [])
    assert read_results(path) == [one, one]


def test_nothing_is_added_to_a_file_of_something_else(tmp_path: Path) -> None:
    other = tmp_path / "README.md"
    other.write_text("# hello\n")
    with pytest.raises(ResultsError, match=r"README\.md, line 1: it is not JSON"):
        check_output(other)
    assert other.read_text() == "# hello\n"
    with pytest.raises(GraspError, match="there is no folder"):
        check_output(tmp_path / "absent" / "results.jsonl")
    check_output(tmp_path / "new.jsonl")
    assert not (tmp_path / "new.jsonl").exists()


@pytest.mark.parametrize(
    "described",
    [*RECORDS, *STUDY_RECORDS, Conditions, Percentiles, StudySetting],
    ids=lambda described: described.__name__,
)
def test_every_field_is_documented_where_it_is_defined(described: type) -> None:
    assert is_dataclass(described)
    attributes = cleandoc(described.__doc__ or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    assert re.findall(r"^ {4}(\w+): \S", attributes, re.MULTILINE) == [field.name for field in fields(described)]
