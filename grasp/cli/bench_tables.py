"""Results of the benchmarks as tables and lines on stdout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich.console import Console

from grasp.bench.schema import Record, notes
from grasp.bench.tables import Table, left_out, tables
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
    """Print the tables of records. ``show_left_out`` prints those that were not measured."""
    for table in tables(records):
        _print_wide_table(table)


def show_notes(records: Iterable[Record]) -> None:
    """Print what the columns mean and under which conditions they were measured, each sentence once."""
    for text in notes(records):
        print_text()
        print_text(text)


def show_left_out(records: Iterable[Record]) -> None:
    """Print one line for each reason why something was not measured."""
    for line in left_out(records):
        print_text(line)


def _print_wide_table(table: Table) -> None:
    """A table; columns that do not fit into the terminal follow in a further one, with the first column repeated."""
    lines = (table.headings, *table.rows)
    title = table.title
    for part in _parts([max(map(len, column)) + _GAP for column in zip(*lines, strict=True)], Console().width):
        headings, *rows = ([line[index] for index in part] for line in lines)
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
