from __future__ import annotations

import json
import re
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest

from grasp.bench.conditions import Conditions
from grasp.bench.results import (
    KINDS,
    SCHEMA_VERSION,
    ModelResult,
    Percentiles,
    StudySetting,
    append_results,
    check_output,
    read_results,
    to_dict,
)
from grasp.errors import ResultsError
from tests.bench.records import record
from tests.command_line import ROOT

SCHEMA = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")


def line(kind: str, /, **changes: object) -> str:
    return json.dumps({**to_dict(record(kind)), **changes})


def test_what_was_written_is_read_back_typed(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    written = [record(kind) for kind in KINDS]
    append_results(path, written[:2])
    append_results(path, written[2:])
    append_results(path, [])
    assert read_results(path) == written
    assert [type(each) for each in read_results(path)] == list(KINDS.values())


def test_a_line_names_its_kind_and_its_schema_first() -> None:
    for kind in KINDS:
        assert list(to_dict(record(kind)).items())[:2] == [("kind", kind), ("schema_version", SCHEMA_VERSION)]


def test_none_survives_where_the_schema_has_it(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    result = record("model", perplexity=None, backend=None)
    append_results(path, [result])
    (read,) = read_results(path)
    assert isinstance(read, ModelResult)
    assert (read.perplexity, read.backend) == (None, None)
    assert read == result


def test_an_integer_is_read_as_the_float_that_the_schema_has(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("op", median_us=7) + "\n\n")
    assert type(read_results(path)[0].median_us) is float  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"kind": "op", "schema', "line 2: not JSON"),
        ("[1]", "line 2: no benchmark result, got a JSON list; expected an object of kind op, model"),
        ('{"op": "lowrank_linear"}', "line 2: no benchmark result, got kind None"),
        (line("op", kind="speed"), "line 2: no benchmark result, got kind 'speed'"),
        (line("op", schema_version=99), "line 2: results of schema_version 99; this version of grasp reads 1"),
        (line("op", median_us="fast"), "line 2: op.median_us is 'fast', which is no float"),
        (line("op", rows=True), "line 2: op.rows is True, which is no int"),
        (line("op", rows=None), "line 2: op.rows is None, which is no int"),
        (line("op", colour=3), "line 2: op has no field 'colour'"),
        (line("model", layers=[1, "two"]), r"line 2: model.layers\[1\] is 'two', which is no int"),
        (line("model", prefill_ms={"p50": 1}), "line 2: model.prefill_ms lacks the field 'p95'"),
        (line("study", setting=3), "line 2: study.setting is 3, which is no object"),
    ],
)
def test_a_damaged_line_is_named_with_its_file_and_number(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_text(line("op") + "\n" + text + "\n")
    with pytest.raises(ResultsError, match=re.escape(str(path)) + ", " + message):
        read_results(path)


def test_a_file_that_is_not_text_or_not_there_is_named(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for name in ("binary", "absent", "."):
        with pytest.raises(ResultsError, match="cannot be read as JSON lines of results"):
            read_results(tmp_path / name)


def test_a_number_that_json_does_not_have_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        append_results(tmp_path / "results.jsonl", [record("op"), record("op", median_us=float("nan"))])
    assert not (tmp_path / "results.jsonl").exists()


def test_nothing_is_added_to_a_file_of_something_else(tmp_path: Path) -> None:
    other = tmp_path / "README.md"
    other.write_text("# hello\n")
    with pytest.raises(ResultsError, match=r"README\.md, line 1: not JSON"):
        check_output(other)
    assert other.read_text() == "# hello\n"
    with pytest.raises(ResultsError, match="there is no folder"):
        check_output(tmp_path / "absent" / "results.jsonl")
    check_output(tmp_path / "new.jsonl")
    check_output(None)
    assert not (tmp_path / "new.jsonl").exists()


def test_every_field_is_documented() -> None:
    for described in (*KINDS.values(), Conditions, Percentiles, StudySetting):
        assert is_dataclass(described)
        name = getattr(described, "kind", described.__name__.lower())
        section = re.split(rf"^### `{name}`", SCHEMA, flags=re.MULTILINE)[1].split("\n### ")[0].split("\n## ")[0]
        documented = re.findall(r"^\| `(\w+)`", section, re.MULTILINE)
        assert documented == [field.name for field in fields(described)], name
