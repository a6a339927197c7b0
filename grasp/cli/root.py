"""The typer application, its entry point and its exit codes."""

from __future__ import annotations

import os
import sys
import warnings
from typing import Annotated

import typer

from grasp.errors import GraspError
from grasp.formatting import one_line
from grasp.version import __version__

app = typer.Typer(
    name="grasp",
    help="Make a causal language model smaller by replacing redundant layers with low-rank ones.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

BAD_INPUT = 2  # exit code
# Environment variables that silence libraries on stderr. They are set before the libraries are imported; variables that
# the user has set stay.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Run the command line. An error that the user can fix is one line on stderr and exit code 2."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # linears that return a view: all of GPT-2's
    try:
        app()
    except (GraspError, ValueError, OSError) as error:
        if "--traceback" in sys.argv:
            raise
        print(f"error: {one_line(error, None)}", file=sys.stderr)
        sys.exit(BAD_INPUT)


def _version(requested: bool) -> None:
    if requested:
        print(f"grasp {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised.")] = False,
) -> None:
    """Options before the command. ``_version`` and ``main`` handle them."""
