"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

from grasp.errors import GraspError


def write_whole(output: Path, text: str) -> None:
    """Write beside ``output``, then take its place: it is complete, or as it was.

    Raises:
        GraspError: if it cannot be written.
    """
    temporary = output.with_name(f".{output.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, output)
    except OSError as error:
        raise GraspError(f"writing {output} failed, nothing was changed: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)
