"""``grasp convert``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any

import typer

from grasp.cli.arguments import Directory, Json
from grasp.cli.compress_options import Output
from grasp.cli.root import app


@app.command()
def convert(
    directory: Directory,
    output: Output,
    to: Annotated[
        str,
        typer.Option(
            metavar="pivoted|factored|linear-pairs|onnx|gguf",
            help="factored: U and Vh. pivoted: rows of the weight instead of Vh; R² fewer parameters at rank R. "
            "linear-pairs: pairs of nn.Linear, for PyTorch tools. onnx: a graph with a KV cache, in fp32. "
            "gguf: a dense file for llama.cpp.",
            show_default=False,
        ),
    ],
    as_json: Json = False,
) -> None:
    """Write a checkpoint in another form, or for other programs. Needs no calibration; exact but for rounding.

    [bold]Examples[/bold]

    $ grasp convert factored -o smaller --to pivoted

    [dim]As U and Vh, which is larger, but versions of grasp before the pivoted form read it:[/dim]

    $ grasp convert small -o factored --to factored

    [dim]For tools that know only nn.Linear:[/dim]

    $ grasp convert small -o small-pairs --to linear-pairs

    [dim]For ONNX Runtime:[/dim]

    $ grasp convert small -o small-onnx --to onnx

    [dim]For llama.cpp, which has no low-rank layers:[/dim]

    $ grasp convert small -o small-gguf --to gguf
    """
    from grasp.cli import console, tables
    from grasp.method.ranks import FORMS
    from grasp.workflows.convert import convert as convert_to_folder
    from grasp.workflows.export import EXPORTS, export

    targets: dict[str, tuple[Callable[..., Any], Callable[[Any], None]]] = {
        **dict.fromkeys(FORMS, (convert_to_folder, tables.show_conversion)),
        **dict.fromkeys(EXPORTS, (export, tables.show_export)),
    }
    if to not in targets:
        raise ValueError(f"--to must be one of {', '.join(targets)}; got {to!r}")
    write, show = targets[to]
    with console.step_bars() as progress:
        result = write(directory, output, to, progress=progress)
    console.print_result(result, show, as_json=as_json)
