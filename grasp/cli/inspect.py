"""``grasp inspect``."""

from __future__ import annotations

from grasp.cli.arguments import Directory, Json
from grasp.cli.root import app


@app.command()
def inspect(directory: Directory, as_json: Json = False) -> None:
    """Show the layers, ranks and bytes of a checkpoint without loading it.

    [bold]Example[/bold]

    $ grasp inspect small
    """
    from grasp.checkpoint import inspection
    from grasp.cli import console, tables

    result = inspection.inspect_checkpoint(directory)
    console.print_result(result, tables.show_inspection, as_json=as_json)
