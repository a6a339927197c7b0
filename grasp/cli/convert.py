"""``grasp convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Json, parse_form
from grasp.cli.compress_options import Output
from grasp.cli.root import app


@app.command()
def convert(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A compressed checkpoint folder.", show_default=False)
    ],
    output: Output,
    form: Annotated[
        str,
        typer.Option(
            metavar="pivoted|factored",
            help="factored: U and Vh. pivoted: rows of the weight instead of Vh; R² fewer parameters at rank R.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write the low-rank layers of a checkpoint in another form. Needs no calibration; exact but for rounding.

    [bold]Examples[/bold]

    $ grasp convert factored -o smaller --form pivoted

    [dim]As U and Vh, which is larger, but versions of grasp before the pivoted form read it:[/dim]

    $ grasp convert small -o factored --form factored
    """
    from grasp.cli import console, tables
    from grasp.workflows.convert import convert as convert_to_folder

    with console.step_bars() as progress:
        result = convert_to_folder(directory, output, parse_form(form), progress=progress)
    console.print_result(result, tables.show_conversion, as_json=as_json)
