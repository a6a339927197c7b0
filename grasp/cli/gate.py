"""``grasp bench gate``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from grasp.bench import gate as gates
from grasp.cli.bench import bench

gate = typer.Typer(help="Work with what `pytest --gate` has recorded.", no_args_is_help=True, rich_markup_mode="rich")
bench.add_typer(gate, name="gate")


@gate.command()
def compare(
    baseline: Annotated[Path, typer.Argument(metavar="BASELINE", help="A document of pytest-benchmark.")],
    now: Annotated[Path, typer.Argument(metavar="NOW", help="Another one, of the same device.")],
    threshold: Annotated[
        float, typer.Option(min=0, help="Slower by more than this fraction is a regression.")
    ] = gates.THRESHOLD,
) -> None:
    """Compare two recorded runs; exit code 1 means a regression, 2 that they cannot be compared.

    [bold]Example[/bold]

    $ grasp bench gate compare baseline.json now.json --threshold 0.1
    """
    result = gates.compare(gates.read(baseline), gates.read(now), threshold)
    for line in result.lines():
        print(line)
    raise typer.Exit(int(result.failed))


@gate.command()
def export(
    document: Annotated[Path, typer.Argument(metavar="DOCUMENT", help="A document of pytest-benchmark.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The JSON file to write.")],
) -> None:
    """Write a recorded run's ratios as github-action-benchmark reads them, tool `customSmallerIsBetter`.

    [bold]Example[/bold]

    $ grasp bench gate export baseline.json -o ratios.json
    """
    gates.write_json(output, gates.smaller_is_better(gates.read(document)))
