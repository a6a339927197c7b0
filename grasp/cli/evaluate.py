"""``grasp evaluate``."""

from __future__ import annotations

from typing import Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json, Model
from grasp.cli.root import app
from grasp.errors import NonFiniteError


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="A text file, wikitext2, c4, or builtin: its held-out part.")
    ] = "builtin",
    window: Annotated[int, typer.Option(help="Tokens the model sees at once.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="New tokens per window; fewer than the window overlap. Default: no overlap.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows in one forward pass.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL, dense or compressed, on a text.

    [bold]Examples[/bold]

    $ grasp evaluate small

    $ grasp evaluate small --text wikitext2 --window 2048 --json
    """
    from grasp import console, jobs, tables

    with console.step_bars() as progress:
        result = jobs.evaluate(
            model,
            text,
            window=window,
            stride=stride,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_evaluation(result)
    if result.result.nonfinite:
        raise NonFiniteError(
            f"{result.result.nonfinite} of {result.result.tokens} tokens have a loss that is NaN or infinite, so the "
            "perplexity is no number; try --dtype float32, or check the model"
        )
