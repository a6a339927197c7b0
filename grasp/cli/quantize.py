"""``grasp quantize``."""

from __future__ import annotations

from functools import partial
from typing import Annotated

import typer

from grasp.cli import compress_options as option
from grasp.cli.arguments import MOST, Device, Dtype, Json, Model, parse_bits
from grasp.cli.root import app

_rounding = partial(typer.Option, rich_help_panel="Rounding")

Bits = Annotated[
    str,
    _rounding(
        metavar="8|4|fp8",
        help="Bits of the linears in the decoder layers. The output layer has 8, and so has the embedding unless 4 are "
        "asked for and it shares no weight with that layer. fp8 is for GPUs of compute capability 8.9 or above: it "
        "has no CPU kernel.",
    ),
]
Group = Annotated[
    int | None, _rounding(metavar="32|64|128", help="Columns with one scale, for 4 bits. 8 and fp8 have one per row.")
]
RoundingName = Annotated[
    str,
    _rounding(
        metavar="loss-aware|nearest",
        help="loss-aware: outputs on the calibration text change least. nearest: needs no text.",
    ),
]
BatchSize = Annotated[int, typer.Option(max=MOST, help="Sequences per forward pass.", rich_help_panel="Calibration")]


@app.command()
def quantize(
    model: Model,
    output: option.Output,
    bits: Bits = "8",
    group: Group = None,
    rounding: RoundingName = "loss-aware",
    calibration: option.Calibration = "builtin",
    num_samples: option.NumSamples = 128,
    seq_len: option.SeqLen = 512,
    batch_size: BatchSize = 1,
    seed: option.Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Store the weights of a model in 8 or 4 bits, dense or compressed by grasp. Plain transformers loads the result.

    [bold]Examples[/bold]

    $ grasp quantize small -o small-int8

    [dim]Linears in 4 bits with a scale for 64 columns; the output layer, and what shares its weight, in 8:[/dim]

    $ grasp quantize small -o small-int4 --bits 4

    [dim]Without calibration:[/dim]

    $ grasp quantize builtin -o int8 --rounding nearest

    [dim]Some linears in 4 bits and some in 8, for a size:[/dim]

    $ grasp compress builtin -o mixed --bits auto --target-bytes 100MB
    """
    from grasp.cli import console, tables
    from grasp.method.storage import choose_storage
    from grasp.workflows.quantize import quantize as quantize_to_folder
    from grasp.workflows.samples import Samples

    samples = Samples(calibration, num_samples, seq_len, batch_size, seed)
    with console.step_bars() as progress:
        result = quantize_to_folder(
            *(model, output, choose_storage(parse_bits(bits), group), samples),
            rounding=rounding,
            dtype=dtype,
            device=device,
            progress=progress,
            notify=progress.note,
        )
    console.print_result(result, tables.show_quantization, as_json=as_json)
