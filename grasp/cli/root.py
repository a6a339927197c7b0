"""The typer application, its entry point and its exit codes."""

from __future__ import annotations

import io
import os
import platform
import re
import shlex
import sys
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from contextlib import suppress
from importlib.metadata import version
from itertools import takewhile
from typing import Annotated, Any, TextIO

import typer
from typer import rich_utils

from grasp.cli.arguments import require_values
from grasp.errors import GraspError
from grasp.formatting import one_line, printable
from grasp.version import __version__

app = typer.Typer(
    name="grasp",
    help="Make a causal language model smaller by replacing weights with low-rank factors.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)

# Exit codes. A command may also end with 1: see ``grasp bench``.
CLOSED = 1  # the reader of stdout is gone
BAD_INPUT = 2
UNEXPECTED = 70  # EX_SOFTWARE of sysexits.h
INTERRUPTED = 130
_HOME = re.compile(r"(--[\w-]+=)(~.*)")  # most shells expand ~ only at the beginning of a word
_LONGEST = 2000  # characters of an error; an argument in it may be longer
# A name of Python's, with the value that it may be shown with. One without "_" may be a word: what follows must tell.
_PARAMETER = re.compile(
    r"(?<![\w./=-])(?P<name>[a-z]+(_[a-z]+)+|[a-z]+(?==| must be|,? (or |and )?(?P<next>[a-z]+(_[a-z]+)+)))\b"
    r"(?![./]\w)(='?(?P<value>[^\s,;:']+)'?)?"
)
_USAGE_ERRORS = typer.BadParameter.__bases__  # UsageError: of the click that typer uses, its own or a package
# Environment variables that silence libraries on stderr. They are set before the libraries are imported; variables that
# the user has set stay.
QUIET = {"TRANSFORMERS_VERBOSITY": "error", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def main() -> None:
    """Run the command line. An error is one line on stderr; the exit code is 2 if the user can correct it, else 70."""
    given = dict(os.environ)  # for the commands that ``grasp bench record`` runs
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    warnings.simplefilter("ignore", FutureWarning)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # linears that return a view: all of GPT-2's
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # was closed when Python started
            setattr(sys, name, io.StringIO())
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack the lines of tables
    arguments = list(takewhile(lambda word: word != "--", sys.argv[1:]))  # others are of a command to record
    try:
        require_values(arguments)
        words = [_HOME.sub(lambda found: f"{found[1]}{os.path.expanduser(found[2])}", word) for word in arguments]
        code = app([*words, *sys.argv[1 + len(arguments) :]], standalone_mode=False, obj=given) or 0
        sys.stdout.flush()
    except Exception as error:  # the last resort: no command ends with a traceback
        if "--traceback" in arguments:
            raise
        code = _explain(error)
    if code == INTERRUPTED and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            print("interrupted", file=sys.stderr)
    for stream, descriptor in ((sys.stdout, 1), (sys.stderr, 2)):
        if not _can_flush(stream):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)  # Python flushes once more, and exits with 120
    sys.exit(code)


def _explain(error: Exception) -> int:
    """Print an exception on stderr, unless it is full or closed, and return the exit code."""
    if isinstance(error, _USAGE_ERRORS):
        with suppress(OSError):
            _show_usage_error(error)
        return BAD_INPUT
    if isinstance(error, BrokenPipeError) and not _can_flush(sys.stdout):
        return CLOSED
    if isinstance(error, (GraspError, ValueError, OSError)):
        text, code = _with_options(one_line(error, _LONGEST)), BAD_INPUT
    else:
        text, code = f"{_with_class(error)}; a defect of grasp: {_write_log()}", UNEXPECTED
    with suppress(OSError):
        print(f"error: {printable(text)}", file=sys.stderr)
    return code


def _with_options(text: str) -> str:
    """The text with options for parameters: ``bits=8, not seq_len`` is ``--bits 8, not --seq-len``."""
    options = dict(_options(typer.main.get_command(app)))

    def option(found: re.Match[str]) -> str:
        if not {found["name"], found["next"] or found["name"]} <= {*options}:
            return found[0]
        return " ".join(filter(None, (options[found["name"]], found["value"])))

    return _PARAMETER.sub(option, text)


def _options(command: Any) -> Iterator[tuple[str, str]]:
    """Parameters and options of a command and of those in it."""
    yield from ((each.name, each.opts[0]) for each in command.params if each.opts[0].startswith("--"))
    for inner in getattr(command, "commands", {}).values():
        yield from _options(inner)


def _show_usage_error(error: Any) -> None:
    """Let typer show its box."""
    error.message = printable(error.message)
    rich_utils.rich_format_error(error)


def _with_class(error: Exception) -> str:
    name, text = type(error).__name__, one_line(error)
    return text if text.startswith(name) else f"{name}: {text}"


def _can_flush(stream: TextIO) -> bool:
    try:
        stream.flush()
    except (OSError, ValueError):  # it is full, or closed
        return False
    return True


def _write_log() -> str:
    """Write the running exception and its circumstances to a file that only this user can read; return the advice."""
    text = (
        f"grasp {__version__}, Python {platform.python_version()}, torch {version('torch')}, {platform.platform()}\n"
        f"{shlex.join(['grasp', *sys.argv[1:]])}\n\n{traceback.format_exc()}"
    )
    try:
        descriptor, path = tempfile.mkstemp(".log", "grasp-")
        with os.fdopen(descriptor, "w", errors="backslashreplace") as file:
            file.write(text)
    except OSError as reason:
        return f"report the output of grasp --traceback ... (no log could be written: {one_line(reason)})"
    return f"report it with {path}"


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
