"""``grasp bench costs``."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from grasp.cli.arguments import Device, Dtype, Json, Model, parse_bits
from grasp.cli.bench import bench


@bench.command()
def costs(
    model: Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="JSON file for grasp compress --costs.", show_default=False),
    ],
    device: Device = None,
    dtype: Dtype = "auto",
    form: Annotated[
        str, typer.Option(metavar="pivoted|factored", help="Of the low-rank linears, as in grasp compress.")
    ] = "pivoted",
    bits: Annotated[
        str | None,
        typer.Option(metavar="8|4|fp8|8,4", help="Also time quantised linears, for grasp compress --bits; auto: 8,4."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Time the linears of MODEL on this machine, dense and low-rank, for one decoded token.

    [bold]grasp compress --target-latency[/bold] uses the table to spend decoding time where it lowers the loss most. It
    may run on another machine than the one it compresses for. Run nothing else during the measurement.

    [bold]Example[/bold]

    $ grasp bench costs builtin -o costs.json
    $ grasp bench costs builtin -o costs.json --bits 8,4
    """
    from grasp.bench.costs import measure_costs
    from grasp.cli import console, tables
    from grasp.files import require_writable
    from grasp.loading import load_quietly
    from grasp.method.ranks import FORMS
    from grasp.method.storage import choose_storage

    if form not in FORMS:
        raise ValueError(f"form must be {' or '.join(FORMS)}; got {form!r}")
    storages = [choose_storage(parse_bits(part.strip())) for part in bits.split(",")] if bits else []
    require_writable(output, parents=True)
    with console.step_bars() as progress:
        loaded, _ = load_quietly(model, dtype=dtype, device=device, progress=progress)
        table = measure_costs(loaded, form, storages, progress=progress)
    try:
        table.save(output)
    finally:  # also if the disk is full
        console.print_result(table, partial(tables.show_costs, output=output), as_json=as_json)
