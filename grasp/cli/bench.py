"""``grasp bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Json, parse_counts
from grasp.cli.root import app

bench = typer.Typer(help="Measure the kernels on this machine.", no_args_is_help=True, rich_markup_mode="rich")
app.add_typer(bench, name="bench")


@bench.command()
def tune(
    shapes: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KxNrR...]", help="Default: the linears of a 7B Llama at a tenth of their parameters."),
    ] = None,
    rows: Annotated[str, typer.Option(help="Tokens per call.")] = "1,2,4,16,32,64,128,256,512",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder. Default: the installed package.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find the fastest launch configurations of the Triton kernels on this GPU, and keep them for later calls.

    [bold]Examples[/bold]

    $ grasp bench tune

    [dim]Two linears that share their input, of 4096 features, to 11008 at rank 298:[/dim]

    $ grasp bench tune 4096x11008r298+4096x11008r298 --rows 1,4,16
    """
    from grasp import console, tuning

    with console.step_bars() as progress:
        files = tuning.tune(shapes or tuning.SHAPES, parse_counts(rows), dtype=dtype, output=output, progress=progress)
    if as_json:
        console.print_json({"files": [str(file) for file in files]})
    else:
        for file in files:
            print(file)
