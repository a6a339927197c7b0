"""Records as tables: for the terminal, as Markdown and as CSV. Pure functions."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, SupportsFloat

from grasp.bench.records import NotMeasured, OpResult
from grasp.bench.schema import Record, case_text, grouped, notes
from grasp.formatting import Column, share

_MOST_PLACES = 12  # that a reason is said to apply to


class Table(NamedTuple):
    """The results of one case as text."""

    title: str  # names the case
    headings: tuple[str, ...]  # of the columns that have a value in some row; the first names the rows
    rows: tuple[tuple[str, ...], ...]  # cells, empty without a value
    numeric: tuple[bool, ...]  # for each column, whether its values are numbers


def tables(records: Iterable[Record]) -> Iterator[Table]:
    """A table for each class of records and each of its cases. ``left_out`` has those that were not measured.

    The calls of a recorded workload are the rows of one table for each processor and number of threads.
    """
    measured = [record for record in records if not isinstance(record, NotMeasured)]
    for (record_class, title), rows in grouped(measured, lambda record: (type(record), _title(record))).items():
        calls = [row for row in rows if isinstance(row, OpResult) and row.calls is not None]
        yield _calls(title, calls) if calls else _table(title, record_class.columns, rows)


def _title(record: Record) -> str:
    if isinstance(record, OpResult) and record.calls is not None:
        return f"Calls of a workload; {record.conditions.processor}"
    return case_text(record, record.case)


def _table(title: str, columns: Sequence[Column], rows: Sequence[Record]) -> Table:
    shown = [column for column in columns if any(map(column.text_of, rows))]
    return Table(
        title,
        tuple(column.heading for column in shown),
        tuple(tuple(column.text_of(row) for column in shown) for row in rows),
        tuple(any(isinstance(column.value_of(row), SupportsFloat) for row in rows) for column in shown),
    )


def _calls(title: str, results: Sequence[OpResult]) -> Table:
    """The calls of a workload that take most time first, each on the backend that ``auto`` chooses if it was timed."""
    cases = grouped(results, lambda result: case_text(result, result.case)).values()
    rows = sorted((next((row for row in case if row.chosen), case[0]) for case in cases), key=_time, reverse=True)
    total = sum(map(_time, rows))
    of_all = Column("of all", lambda row: _time(row) / total, share)
    return _table(title, (*OpResult.case, *OpResult.columns, of_all), rows)


def _time(result: OpResult) -> float:
    """Of all calls, µs."""
    return result.median_us * (result.calls or 0)


def left_out(records: Iterable[Record]) -> Iterator[str]:
    """One line for each reason why something was not measured, with all places that it applies to."""
    lines = [record for record in records if isinstance(record, NotMeasured)]
    same_reason = grouped(lines, lambda line: (line.wrong, line.provider, line.op, line.not_measured))
    for (wrong, provider, op, reason), same in same_reason.items():
        subject = provider if op is None else f"{provider} {op}"
        yield f"{'WRONG' if wrong else 'Not measured'}: {subject} at {_places(same)}: {reason}"


def markdown(records: Sequence[Record]) -> str:
    """The tables as Markdown, with their notes and what was left out below."""
    parts = []
    for table in tables(records):
        ends = ["--:" if number else "---" for number in table.numeric]
        lines = [f"|{'|'.join(map(_cell, cells))}|" for cells in (table.headings, *table.rows)]
        parts.append("\n".join([f"**{table.title}**", "", lines[0], f"|{'|'.join(ends)}|", *lines[1:]]))
    return "\n\n".join([*parts, *notes(records), *left_out(records)]) + "\n"


def comma_separated(records: Sequence[Record]) -> str:
    """One row per record and one column per field, as in JSON: ``prefill_ms.p50``, ``conditions.threads``."""
    rows = [dict(_flat(record.to_dict())) for record in records]
    text = io.StringIO()
    table = csv.DictWriter(text, dict.fromkeys(name for row in rows for name in row), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


# By the ending of a file's name; other files have JSON lines.
FORMATS: Mapping[str, Callable[[Sequence[Record]], str]] = {".md": markdown, ".csv": comma_separated}


def _cell(text: str) -> str:
    return f" {' '.join(text.split()).replace('|', chr(92) + '|')} "


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and plain values of nested mappings; lists are JSON."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, json.dumps(value) if isinstance(value, (list, tuple)) else value


def _places(lines: Sequence[NotMeasured]) -> str:
    """Where a reason applies: batch sizes of a model, all loads of a server, or shapes, rows and dtypes of an op."""
    if lines[0].benchmark == "serve":
        return "every concurrency"
    if lines[0].benchmark == "model":
        return f"batch {_distinct(line.batch_size for line in lines)}"
    places = [
        f"{shape}, M = {_distinct(line.rows for line in same)}, {_distinct(line.dtype for line in same)}"
        for shape, same in grouped(lines, lambda line: line.shape).items()
    ]
    if len(places) > _MOST_PLACES:
        places[_MOST_PLACES:] = [f"and {len(places) - _MOST_PLACES} more shapes"]
    return "; ".join(places)


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
