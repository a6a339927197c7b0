"""``grasp report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import CompressedDirectory, Json
from grasp.cli.root import app


@app.command()
def report(
    directory: CompressedDirectory,
    output: Annotated[Path, typer.Option("--output", "-o", help="HTML file; an earlier page is replaced.")] = Path(
        "report.html"
    ),
    results: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Results of benchmarks, JSON lines; repeatable.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page about a compressed checkpoint: its report, figures, tables, and rerun command.

    [bold]Examples[/bold]

    $ grasp report small -o report.html

    [dim]With results of benchmarks:[/dim]

    $ grasp report small --results model.jsonl --results ops.jsonl
    """
    from grasp.cli import console
    from grasp.reporting.page import write_report

    write_report(directory, output, results or [])
    console.print_result({"page": str(output)}, lambda _: console.print_line(output), as_json=as_json)
