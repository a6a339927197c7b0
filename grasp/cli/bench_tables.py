"""Results of the benchmarks as tables and lines on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from grasp.bench.records import NotMeasured
from grasp.bench.schema import Record, case_text, grouped, notes
from grasp.cli.console import print_table, print_text
from grasp_kernels.roofline import Card

_GAP = 3  # characters between two columns of a table


def show_cards(cards: dict[str, Card], threads: int | None) -> None:
    """The measured limits of the device, by dtype."""
    for dtype, card in cards.items():
        device = card.name if threads is None else f"{card.name}, threads: {threads}"
        speeds = f"reads {card.bandwidth / 1e9:.1f} GB/s, multiplies {card.flops / 1e9:.0f} GFLOP/s in {dtype}"
        print_text(f"{device}: {speeds}")


def show_results(records: Iterable[Record]) -> None:
    """Print a table for each class of records and each of its cases. ``show_left_out`` prints those left out."""
    measured = [record for record in records if not isinstance(record, NotMeasured)]
    cases = grouped(measured, lambda record: (type(record), case_text(record, record.case)))
    for (record_class, title), rows in cases.items():
        columns = ([column.heading, *map(column.text_of, rows)] for column in record_class.columns)
        _print_wide_table([column for column in columns if any(column[1:])], title)


def show_notes(records: Iterable[Record]) -> None:
    """Print what the columns mean and under which conditions they were measured, each sentence once."""
    for text in notes(records):
        print_text()
        print_text(text)


def show_left_out(records: Iterable[Record]) -> None:
    """Print one line for each reason why something was not measured, with all places that it applies to."""
    left_out = [record for record in records if isinstance(record, NotMeasured)]
    same_reason = grouped(left_out, lambda line: (line.wrong, line.provider, line.op, line.not_measured))
    for (wrong, provider, op, reason), lines in same_reason.items():
        subject = provider if op is None else f"{provider} {op}"
        print_text(f"{'WRONG' if wrong else 'Not measured'}: {subject} at {_places(lines)}: {reason}")


def _print_wide_table(columns: Sequence[Sequence[str]], title: str) -> None:
    """A table of columns that start with their heading.

    Columns that do not fit into the terminal follow in a further table, with the first column repeated.
    """
    for part in _parts([max(map(len, column)) + _GAP for column in columns], Console().width):
        headings, *rows = zip(*(columns[index] for index in part), strict=True)
        print_table(headings, rows, title=title)
        title = ""


def _parts(widths: Sequence[int], available: int) -> Iterator[list[int]]:
    """The columns of each table: the first column and as many others as fit, at least one."""
    part = [0]
    for index in range(1, len(widths)):
        if len(part) > 1 and sum(widths[i] for i in [*part, index]) - _GAP > available:
            yield part
            part = [0]
        part.append(index)
    yield part


def _places(lines: Sequence[NotMeasured]) -> str:
    """Where a reason applies: batch sizes of a model, or shapes, rows and dtypes of an op."""
    if lines[0].benchmark == "model":
        return f"batch {_distinct(line.batch_size for line in lines)}"
    return "; ".join(
        f"{shape}, M = {_distinct(line.rows for line in same)}, {_distinct(line.dtype for line in same)}"
        for shape, same in grouped(lines, lambda line: line.shape).items()
    )


def _distinct(values: Iterable[object]) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
