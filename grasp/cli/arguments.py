"""Arguments of several commands, and parsers of their values."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer

MOST = 10**9  # of anything that is counted; larger numbers overflow the libraries
MOST_THREADS = 1024
_MOST_LAYERS = 10_000  # more than any model has; a range is expanded in memory
_MOST_BYTES = 10**18

_MODEL = "A folder, a GGUF file, a name on the Hugging Face hub, or [bold]builtin[/bold] (SmolLM2-135M)."
Model = Annotated[str, typer.Argument(metavar="MODEL", help=_MODEL, show_default=False)]
Directory = Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder.", show_default=False)]
CompressedDirectory = Annotated[
    Path, typer.Argument(metavar="DIR", help="A compressed checkpoint folder.", show_default=False)
]
Device = Annotated[
    str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: CUDA where there is a GPU.", rich_help_panel="Run")
]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16, or auto: as stored, float32 for GGUF and builtin.", rich_help_panel="Run"
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of tables.")]


def parse_layers(text: str) -> tuple[int, ...]:
    """Parse ``"3,12-17"`` as (3, 12, 13, 14, 15, 16, 17).

    Raises:
        ValueError: if the text is anything else.
    """
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]+)\s*(?:-\s*([0-9]+)\s*)?", part)
        first, last = (0, -1) if match is None else (_number(match[1]), _number(match[2] or match[1]))
        if last < first:
            raise ValueError(f"layers must be numbers and ranges such as 3,12-17, got {text!r}")
        if last >= _MOST_LAYERS:
            raise ValueError(f"layers must be below {_MOST_LAYERS}, got {text!r}")
        layers += range(first, last + 1)
    return tuple(layers)


def parse_bits(text: str) -> int | str:
    """Parse ``"8"`` as 8. Names, such as ``"fp8"``, stay as they are."""
    return int(text) if text.isdecimal() else text


def parse_counts(text: str, name: str = "rows", *, least: int = 1, most: int = MOST) -> tuple[int, ...]:
    """Parse ``"1,4,16"`` as (1, 4, 16).

    Raises:
        ValueError: if the text is anything else, or has a number below ``least`` or above ``most``.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"0|[1-9][0-9]*", part) and _number(part) >= least for part in parts):
        raise ValueError(f"{name} must be {'positive ' * (least > 0)}numbers such as 1,4,16; got {text!r}")
    return tuple(_count(part, name, most) for part in parts)


def parse_batch_size(text: str) -> int | Literal["auto"]:
    """Parse ``"4"`` as 4 and ``"auto"`` as itself.

    Raises:
        ValueError: if the text is anything else.
    """
    if text == "auto":
        return "auto"
    if not re.fullmatch(r"[1-9][0-9]*", text):
        raise ValueError(f"batch size must be a positive number or auto; got {text!r}")
    return _count(text, "batch size")


def parse_bytes(text: str) -> int:
    """Parse ``"200MB"`` as 200000000 and ``"1.5GiB"`` as 1610612736; a plain number is in bytes.

    Raises:
        ValueError: if the text is anything else.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(?:([KMGT])(i?)B|B)?\s*", text, re.IGNORECASE)
    if match is None:
        raise ValueError(f"bytes must be a number such as 200MB, 1.5GB or 2GiB; got {text!r}")
    prefix, base = (match[2] or "").upper(), 1024 if match[3] else 1000
    number = float(match[1]) * base ** " KMGT".index(prefix or " ")
    if number > _MOST_BYTES:
        raise ValueError(f"bytes must be at most {_MOST_BYTES}, got {text!r}")
    return round(number)


def require_values(arguments: Sequence[str]) -> None:
    """Check that no argument is empty; an empty path would mean the working folder.

    Raises:
        ValueError: if one is.
    """
    for before, argument in zip(("", *arguments), arguments, strict=False):
        if argument == "" or re.fullmatch(r"--[\w-]+=", argument):
            name = argument or (before if before.startswith("-") else "an argument")
            raise ValueError(f"{name.removesuffix('=')} has an empty value; give one, or leave it out")


def _count(digits: str, name: str, most: int = MOST) -> int:
    if (number := _number(digits)) > most:
        raise ValueError(f"{name} must be at most {most}, got {digits}")
    return number


def _number(digits: str) -> int:
    """Decimal digits as a number; thousands of them, which ``int`` refuses, as one above all limits."""
    return int(digits) if len(digits) < 1000 else 10**1000
