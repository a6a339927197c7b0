"""Output of the command line: progress on stderr, tables or JSON on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from grasp.formatting import json_text

_STEP_WIDTH = 28  # characters


class StepBars:
    """A ``Progress`` callback: a bar for the running step, and one line with its time for a finished step.

    A step with ``done == 0`` has no bar yet, because a library may show its own.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bars: Progress | None = None
        self._task = TaskID(0)
        self._step = ""
        self._since = time.perf_counter()

    def __call__(self, step: str, done: int, total: int) -> None:
        """Show that ``done`` of ``total`` units of ``step`` are done."""
        if self._step not in ("", step):
            self.close()
        self._step = step
        if done == 0:
            if self._console.is_interactive:
                self._console.print(f"{step} ...", end="\r", highlight=False)
        elif done < total:
            self._show(done, total)
        else:
            seconds = time.perf_counter() - self._since
            self.close()
            self._console.print(f"{step:<{_STEP_WIDTH}} {seconds:7.1f} s", highlight=False)

    def note(self, text: str) -> None:
        """Show one line."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Remove the bar."""
        if self._bars is not None:
            self._bars.stop()
        self._bars, self._step, self._since = None, "", time.perf_counter()

    def _show(self, done: int, total: int) -> None:
        if not self._console.is_interactive:
            return
        if self._bars is None:
            self._bars = Progress(
                TextColumn(f"{{task.description:<{_STEP_WIDTH}}}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("left"),
                console=self._console,
                transient=True,
            )
            self._task = self._bars.add_task(self._step, total=total)
            self._bars.start()
        self._bars.update(self._task, completed=done, total=total)


@contextmanager
def step_bars(*, quiet: bool = False) -> Iterator[StepBars]:
    """Show bars on stderr while the block runs, and ``interrupted`` after Ctrl-C; with ``quiet``, show nothing."""
    console = Console(stderr=True, quiet=quiet)
    bars = StepBars(console)
    try:
        yield bars
    except KeyboardInterrupt:
        bars.close()
        console.print("interrupted")
        raise
    finally:
        bars.close()


def print_json(document: Any) -> None:
    """Print one JSON document."""
    sys.stdout.write(json_text(document))


def print_result(result: Any, show: Callable[[Any], None], *, as_json: bool) -> None:
    """Print the ``to_dict`` of a result as JSON, or let ``show`` print it as tables."""
    if as_json:
        print_json(result.to_dict())
    else:
        show(result)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, title: str | None = None) -> None:
    """Print a table. The first column is left-aligned, the others are right-aligned."""
    print_text()
    if title:
        Console().print(f"[bold]{title}[/bold]", highlight=False)
    table = Table(box=SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=index > 0)
    for row in rows:
        table.add_row(*row)
    Console().print(table)


def print_facts(facts: Sequence[tuple[str, str]], *, title: str | None = None) -> None:
    """Print names and values, one pair per line."""
    if title:
        Console().print(f"\n[bold]{title}[/bold]")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in facts:
        table.add_row(name, value)
    Console().print(table)


def print_text(text: str = "") -> None:
    """Print plain lines, wrapped at the terminal's width."""
    Console().print(text, highlight=False, markup=False)
