"""The tables of benchmark results on the page of ``grasp report``."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePath

from grasp.bench.records import RECORDS, ModelResult
from grasp.bench.schema import Record, case_text, grouped, notes
from grasp.errors import ResultsError
from grasp.reporting.html import not_measured, paragraph, table


def result_tables(records: Sequence[Record], model: str, folder: str) -> Iterator[str]:
    """A table for each class of records, or the command that measures them: ``folder`` has the compressed ``model``."""
    by_class = grouped(records, lambda record: type(record))
    for record_class in dict.fromkeys([*RECORDS, *by_class]):
        if record_class in by_class:
            yield result_table(by_class[record_class])
        elif record_class.missing:
            command = record_class.command.format(model=shlex.quote(model), folder=shlex.quote(folder))
            report = f"grasp report {shlex.quote(folder)} --results {record_class.kind}.jsonl"
            yield not_measured(record_class.missing, f"{command}\n{report}")


def result_table(records: Sequence[Record]) -> str:
    """The records of one class as a table, with what all share above it and their notes below."""
    first = records[0]
    varying = [column for column in first.case if len({column.text_of(record) for record in records}) > 1]
    shared = case_text(first, [column for column in first.case if column not in varying])
    text = paragraph(f"All rows: {shared}.") if shared else ""
    return table(first.title, (*varying, *first.columns), records, text) + "".join(map(paragraph, notes(records)))


def require_same_model(records: Sequence[Record], model: str | None, folder: str, parameters: int, path: Path) -> None:
    """Refuse results of another model than the one that was compressed.

    Args:
        records: the records of one file.
        model: name of the model that was compressed, if it is known. Names are compared without folders.
        folder: name of the compressed checkpoint.
        parameters: number of parameters of the model before.
        path: the file, for the message.

    Raises:
        ResultsError: with both names, or both sizes.
    """
    for record in records:
        if record.measured_model is None:
            continue
        name = PurePath(record.measured_model).name
        if model is not None and name not in (PurePath(model).name, folder):
            raise ResultsError(
                f"{path} has results of {record.measured_model}, but {folder} was made from {model}; omit the file"
            )
        if not isinstance(record, ModelResult) or record.provider != "dense":
            continue
        if name != folder and record.parameters != parameters:
            raise ResultsError(
                f"{path} has results of {record.measured_model} with {record.parameters} parameters, but "
                f"{folder} was made from a model with {parameters}; omit the file"
            )
