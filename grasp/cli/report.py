"""``grasp report``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Json
from grasp.cli.root import app


@app.command()
def report(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A compressed checkpoint folder.", show_default=False)
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The page; an earlier one there is replaced.")] = Path(
        "report.html"
    ),
    results: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="What benchmarks measured, JSON lines; can be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write one self-contained page about a compressed checkpoint: what was done, figures, tables, how to repeat it.

    [bold]Examples[/bold]

    $ grasp report small -o report.html

    [dim]With what was measured:[/dim]

    $ grasp report small --results model.jsonl --results ops.jsonl
    """
    from grasp.cli import console
    from grasp.reporting.page import write_report

    write_report(directory, output, results or [])
    if as_json:
        console.print_json({"page": str(output)})
    else:
        print(output)
