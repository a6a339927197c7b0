"""Output of the command line: progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console
from rich.control import Control
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from grasp.formatting import duration, json_text, printable
from grasp.progress import TimeLeft

_STEP_WIDTH = 28  # characters
_NAME_WIDTH = 16


def _literal(text: str, keep: str = "") -> Text:
    """Text in which rich finds neither markup nor emoji names, and the terminal no control characters."""
    return Text(printable(text, keep))


class StepBars:
    """A ``Progress`` callback: a bar for the running step, and one line with its time for a finished step.

    Steps may take turns; the time of each is added up. A step with ``done == 0`` has no bar yet, because a library may
    show its own.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._step = ""
        self._seconds: dict[str, float] = defaultdict(float)  # of the steps that are not finished
        self._since = time.perf_counter()
        self._job: TimeLeft | None = None
        self._left = ""  # of the whole job

    def expect(self, job: TimeLeft) -> None:
        """Show the time that the whole job has left beside each bar."""
        self._job = job

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of ``step`` are done."""
        if self._step not in ("", step):
            self.close()
        now = time.perf_counter()
        self._seconds[step] += now - self._since
        self._step, self._since = step, now
        if self._job is not None and done:
            self._left = f"({duration(self._job.after(step, done, total, now))} in all)"
        if done == 0:
            if self._console.is_interactive:
                self._console.print(_literal(f"{step} ..."), end="\r", no_wrap=True, overflow="ellipsis")
        elif done < total:
            self._show(done, total)
        else:
            self.close()
            self._console.print(_literal(f"{step:<{_STEP_WIDTH}} {self._seconds.pop(step):7.1f} s"))

    def note(self, text: str) -> None:
        """Show one line."""
        self._console.print(_literal(text), soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
        elif self._step and self._console.is_interactive:
            self._console.control(Control((ControlType.ERASE_IN_LINE, 2)))  # "STEP ..."
        self._bars, self._step = None, ""

    def _show(self, done: int, total: int) -> None:
        if not self._console.is_interactive:
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn(f"{{task.description:<{_STEP_WIDTH}}}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left {task.fields[job]}"),
                console=self._console,
                transient=True,
            )
            self._task = self._bars.add_task(printable(self._step), total=total, job=self._left)
            self._bars.start()
        self._bars.update(self._task, completed=done, total=total, job=self._left)


@contextmanager
def step_bars(*, quiet: bool = False) -> Iterator[StepBars]:
    """Show bars on stderr while the block runs; with ``quiet``, show nothing."""
    bars = StepBars(Console(stderr=True, quiet=quiet))
    try:
        yield bars
    finally:
        bars.close()


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_text(document))


def print_result(result: Any, show: Callable[[Any], None], *, as_json: bool) -> None:
    """Print a result, a mapping or an object with ``to_dict``, as JSON, or let ``show`` print it for people."""
    if as_json:
        print_json(result if isinstance(result, dict) else result.to_dict())
    else:
        show(result)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table. The first column is left-aligned, the others are right-aligned.

    If the terminal is too narrow, the first column is folded to its longest word or to ``_NAME_WIDTH``, and lines that
    are still too long are left to the terminal: no number is cut.
    """
    _print_title(title)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    needed = 3 * (len(columns) - 1)  # between the columns
    for index, column in enumerate(columns):
        cells = [_literal(column, "\n"), *(_literal(row[index]) for row in rows)]
        parts = chain.from_iterable(cell.plain.split("\n" if index else None) for cell in cells)
        width = max(map(cell_len, parts), default=0)
        if index:
            table.add_column(cells[0], justify="right", no_wrap=True, min_width=width)
        else:
            width = min(width, _NAME_WIDTH)
            table.add_column(cells[0], overflow="fold", min_width=width)
        needed += width
    for row in rows:
        table.add_row(*map(_literal, row))
    console = Console()
    console.width = max(console.width, needed)
    console.print(table)


def print_facts(facts: Sequence[tuple[str, str]], *, title: str | None = None) -> None:
    """Print names and values, one pair per line; a pair without a value is left out."""
    if title:
        _print_title(title)
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        if value:
            table.add_row(_literal(name), _literal(value))
    Console().print(table)


def print_text(text: str = "") -> None:
    """Print one plain line, wrapped at the terminal's width."""
    Console().print(_literal(text))


def print_line(text: object) -> None:
    """Print one line that a script may read, such as a path: it is not wrapped."""
    print(printable(str(text)))


def _print_title(title: str | None) -> None:
    """Print an empty line, and a title in bold if there is one."""
    print_text()
    if title:
        Console().print(_literal(title), style="bold")
