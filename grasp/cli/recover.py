"""``grasp recover``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import MOST, Device, Dtype, Json
from grasp.cli.compress_options import Output
from grasp.cli.processes import started_together
from grasp.cli.root import app

_data = partial(typer.Option, rich_help_panel="Data")
_training = partial(typer.Option, rich_help_panel="Training")

Directory = Annotated[
    Path,
    typer.Argument(metavar="DIR", help="Checkpoint of grasp compress or grasp quantize.", show_default=False),
]
Text = Annotated[
    str | None,
    _data(
        metavar="FILE|NAME",
        help="Training text: a text file, wikitext2, c4, or builtin, the default.",
        show_default=False,
    ),
]
Instructions = Annotated[
    Path | None,
    _data(
        metavar="FILE.jsonl",
        help="Train on instructions in the Alpaca format instead; the loss counts only the answers.",
        show_default=False,
    ),
]
Tokens = Annotated[
    int | None, _data(max=1000 * MOST, help="Training tokens, repetitions included. Default: one pass over the data.")
]
SeqLen = Annotated[int, _data(max=MOST, help="Tokens per sequence; longer instructions are truncated.")]
TeacherName = Annotated[
    str | None,
    _training(
        metavar="MODEL",
        help="Train towards the predictions of this model, usually the dense one, instead of the text's next tokens.",
        show_default=False,
    ),
]
LearningRate = Annotated[
    float | None,
    _training(
        help="Peak learning rate, relative to the sizes of rows and columns. Default: 1e-4 for factors, 1e-3 for the "
        "scales of a quantised checkpoint.",
        show_default=False,
    ),
]
BatchSize = Annotated[
    int | None,
    _training(
        max=MOST,
        help="Sequences per optimizer step, over all processes. Default: 1 to 16, for about 100 steps.",
        show_default=False,
    ),
]
MicroBatchSize = Annotated[int, _training(max=MOST, help="Sequences per forward pass; memory limits it.")]
Seed = Annotated[int, _training(min=-MOST, max=MOST, help="Seed of the order of the sequences.")]


@app.command()
def recover(
    directory: Directory,
    output: Output,
    text: Text = None,
    instructions: Instructions = None,
    tokens: Tokens = None,
    seq_len: SeqLen = 512,
    teacher: TeacherName = None,
    learning_rate: LearningRate = None,
    batch_size: BatchSize = None,
    micro_batch_size: MicroBatchSize = 4,
    seed: Seed = 0,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Recover quality lost in compression: train the low-rank factors of a checkpoint, or scales of a quantised one.

    5 % of the sequences (at most 32) are held out. The factors with the lowest held-out loss are saved.

    If interrupted, run the same command again to resume. Progress is stored in OUTPUT.partial until the run finishes.

    [bold]Examples[/bold]

    $ grasp recover small -o recovered

    [dim]Train on two million tokens of your own text:[/dim]

    $ grasp recover small -o recovered --text corpus.txt --tokens 2000000

    [dim]Train towards the predictions of the dense model, here the built-in one:[/dim]

    $ grasp recover small -o recovered --teacher builtin --tokens 100000

    [dim]Train the scales of a quantised checkpoint likewise:[/dim]

    $ grasp recover small-int4 -o recovered --teacher builtin --tokens 100000

    [dim]Train a checkpoint of --preset paper on instructions, as in the paper:[/dim]

    $ grasp recover small -o recovered --instructions alpaca.jsonl --seq-len 256 --batch-size 32 --learning-rate 1e-3

    [dim]Use two processes, which share each batch:[/dim]

    $ torchrun --nproc-per-node 2 -m grasp recover small -o recovered
    """
    from grasp.cli import console, tables
    from grasp.recovery import RecoveryConfig
    from grasp.workflows.recover import TrainingData
    from grasp.workflows.recover import recover as recover_to_folder

    config = RecoveryConfig(learning_rate, tokens, batch_size, micro_batch_size, seed)
    data = TrainingData(text, instructions, seq_len)
    with started_together(device) as (processes, place), console.step_bars(quiet=not processes.first) as progress:
        result = recover_to_folder(
            *(directory, output, config, data),
            teacher=teacher,
            dtype=dtype,
            device=place,
            progress=progress,
            notify=progress.note,
            processes=processes,
        )
    if processes.first:
        console.print_result(result, tables.show_recovery, as_json=as_json)
