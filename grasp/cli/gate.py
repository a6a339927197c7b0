"""``grasp bench gate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.bench import gate as gates
from grasp.cli.bench import bench
from grasp.cli.console import print_line
from grasp.files import require_writable, write_whole
from grasp.formatting import json_text

gate = typer.Typer(
    help="Compare and export the results of `pytest --gate`.", no_args_is_help=True, rich_markup_mode="rich"
)
bench.add_typer(gate, name="gate")


@gate.command()
def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="A JSON file of pytest-benchmark.")],
    now: Annotated[Path, typer.Argument(metavar="NOW", help="Another file, from the same device.")],
    threshold: Annotated[
        float, typer.Option(min=0, help="Slower by more than this fraction is a regression.")
    ] = gates.THRESHOLD,
) -> None:
    """Compare two recorded runs. Exit code 1: a regression; 2: the runs cannot be compared.

    [bold]Example[/bold]

    $ grasp bench gate compare baseline.json now.json --threshold 0.1
    """
    result = gates.compare(gates.read(baseline), gates.read(now), threshold)
    for line in result.lines():
        print_line(line)
    raise typer.Exit(int(result.failed))


@gate.command()
def export(
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="A JSON file of pytest-benchmark.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
) -> None:
    """Write the ratios of a recorded run for github-action-benchmark, tool `customSmallerIsBetter`.

    [bold]Example[/bold]

    $ grasp bench gate export baseline.json -o ratios.json
    """
    require_writable(output, parents=True)
    write_whole(output, json_text(gates.smaller_is_better(gates.read(document))))
