"""``grasp demo``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Json
from grasp.cli.root import app


@app.command()
def demo(
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="Folder for the result; replaces an earlier demo."),
    ] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Compress SmolLM2-135M and compare dense, best, layers removed, GRASP and plain SVD. Takes minutes, offline.

    [bold]Example[/bold]

    $ grasp demo
    """
    from grasp.cli import console, tables
    from grasp.workflows.demo import run_demo

    with console.step_bars() as progress:
        result = run_demo(output, progress=progress)
    console.print_result(result, tables.show_demo, as_json=as_json)
