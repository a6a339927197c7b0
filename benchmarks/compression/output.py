"""Results of these benchmarks, as JSON lines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import typer

from grasp.errors import GraspError
from grasp.files import require_writable

Result = TypeVar("Result", bound=Any)  # a dataclass


def saved(results: Iterable[Result], output: Path | None) -> Iterator[Result]:
    """Append each result to a file as it comes; ``None`` is no file.

    Raises:
        typer.BadParameter: if the file cannot be written, before the first result.
    """
    if output is not None:
        try:
            require_writable(output)
        except GraspError as error:
            raise typer.BadParameter(str(error)) from error
    for result in results:
        if output is not None:
            with output.open("a") as file:
                file.write(json.dumps(asdict(result)) + "\n")
        yield result
