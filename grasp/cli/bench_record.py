"""``grasp bench record``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.bench import bench


@bench.command(context_settings={"allow_interspersed_args": False})
def record(
    context: typer.Context,
    command: Annotated[
        list[str], typer.Argument(metavar="COMMAND", help="Any command, with its arguments.", show_default=False)
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="File for grasp bench ops --workload; it is replaced.")
    ] = Path("workload.json"),
) -> None:
    """Run COMMAND, and record which low-rank ops it and its processes call, at which shapes, and how often.

    If it is interrupted or killed, the calls until then are kept.

    The exit code is the command's, but 2 instead of 0 if no op was called.

    [bold]Examples[/bold]

    $ grasp bench record -o workload.json -- python generate.py

    [dim]Then time these calls, weighted by how often they were made:[/dim]

    $ grasp bench ops --workload workload.json
    """
    from grasp.bench.recording import NOTHING, record_command
    from grasp.cli import console
    from grasp.errors import GraspError

    code, recording = record_command(command, output, context.obj or os.environ)
    if not recording.calls and code == 0:
        raise GraspError(f"{NOTHING}; {output} is not written")
    calls = sum(call.count for call in recording.calls)
    captured = sum(call.count for call in recording.calls if call.captured)
    processes = f"{recording.processes} process" + "es" * (recording.processes > 1)
    with console.step_bars() as bars:
        if calls:
            bars.note(f"{output}: {calls} calls of low-rank ops, {len(recording.calls)} different, by {processes}")
        else:
            bars.note(f"{NOTHING}; {output} is not written")
        if captured:
            bars.note(f"{captured} of them were captured into CUDA graphs, whose replays are not counted")
    raise typer.Exit(code)
