"""``grasp recover``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json
from grasp.cli.processes import started_together
from grasp.cli.root import app


@app.command()
def recover(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="A checkpoint that grasp compress wrote.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder for the checkpoint; new or empty.", show_default=False)
    ],
    text: Annotated[
        str, typer.Option(metavar="FILE|NAME", help="What to train on: a text file, wikitext2, c4, or builtin.")
    ] = "builtin",
    instructions: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.jsonl",
            help="Instead: instructions and answers, in Alpaca's form; the loss counts the answers.",
            show_default=False,
        ),
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="How many tokens to train on, repeats counted. Default: each once.")
    ] = None,
    seq_len: Annotated[int, typer.Option(help="Tokens in a sequence; longer instructions are cut off.")] = 512,
    learning_rate: Annotated[float, typer.Option(help="At its highest. Paper, for 7B: 3e-4.")] = 5e-4,
    batch_size: Annotated[int, typer.Option(help="Sequences per step, over all processes.")] = 16,
    micro_batch_size: Annotated[int, typer.Option(help="Sequences in one pass; memory limits them.")] = 4,
    device: Device = None,
    dtype: Dtype = "auto",
    seed: Annotated[int, typer.Option(help="The order of the sequences.")] = 0,
    as_json: Json = False,
) -> None:
    """Win back a part of what compression cost: train the low-rank factors of a checkpoint, and nothing else.

    A twentieth of the data is held out, 32 sequences at most: training ends when the loss there no longer falls, and
    the best factors are saved. If this is killed, the same command goes on from where it was: until the end that is
    kept in OUTPUT.partial.

    [bold]Examples[/bold]

    $ grasp recover small -o recovered

    [dim]On text of your own, two million tokens of it:[/dim]

    $ grasp recover small -o recovered --text corpus.txt --tokens 2000000

    [dim]On instructions, as in the paper:[/dim]

    $ grasp recover small -o recovered --instructions alpaca.jsonl --seq-len 256 --batch-size 32 --learning-rate 3e-4

    [dim]In two processes, which share each batch:[/dim]

    $ torchrun --nproc-per-node 2 -m grasp recover small -o recovered
    """
    from grasp.cli import console, tables
    from grasp.recovery import RecoveryConfig
    from grasp.workflows import recover as recovery_job

    config = RecoveryConfig(learning_rate, tokens, batch_size, micro_batch_size, seed)
    data = recovery_job.Data(text, instructions, seq_len)
    with started_together(device) as (processes, place), console.step_bars(quiet=not processes.first) as progress:
        result = recovery_job.recover(
            *(directory, output, config, data),
            dtype=dtype,
            device=place,
            progress=progress,
            notify=progress.note,
            processes=processes,
        )
    if not processes.first:
        return
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_recovery(result)
