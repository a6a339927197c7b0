"""``grasp env``."""

from __future__ import annotations

from grasp.cli.arguments import Json
from grasp.cli.root import app


@app.command()
def env(as_json: Json = False) -> None:
    """Show versions, processors and the kernel backends that can run here, with the reasons of those that cannot.

    [bold]Example[/bold]

    $ grasp env --json
    """
    from grasp import environment
    from grasp.cli import console, tables

    console.print_result(environment.environment(), tables.show_environment, as_json=as_json)
