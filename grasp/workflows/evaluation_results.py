"""Files of what ``grasp evaluate`` measured: where they may be written, and which of them a model card shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grasp.checkpoint.card import read_card, with_results
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.errors import ResultsError
from grasp.files import write_whole
from grasp.formatting import json_text

if TYPE_CHECKING:
    from grasp.workflows.evaluate import Evaluation


def require_replaceable(output: Path) -> None:
    """Check that results can be written to a file, and into a card, before anything is measured.

    Raises:
        ResultsError: if its folder is not there, or it is something else than earlier results.
        CheckpointError: if the card that is to show them cannot be read.
    """
    if not output.resolve().parent.is_dir():
        raise ResultsError(f"no folder {output.resolve().parent} to write {output.name} to; make it first")
    if output.exists() and read_results(output) is None:
        raise ResultsError(f"{output} exists and holds no results of `grasp evaluate`; give another name")
    if _has_our_card(output.parent):
        read_card((output.parent / "README.md").read_text(encoding="utf-8"))


def write(result: Evaluation, output: Path) -> None:
    """Write results whole or not at all; the card of a compressed checkpoint that they lie in shows them from then on.

    Raises:
        GraspError: if something cannot be written.
    """
    write_whole(output, json_text(result.to_dict()))
    if _has_our_card(output.parent):
        update_card(output.parent)


def _has_our_card(folder: Path) -> bool:
    """Whether a folder is a compressed checkpoint with a card; that of a dense model is its authors'."""
    if not ((folder / "README.md").is_file() and (folder / "config.json").is_file()):
        return False
    return bool(inspect_checkpoint(folder).modules)


def update_card(folder: Path) -> None:
    """Show in the card of a checkpoint folder the results that lie there, and no others.

    Raises:
        CheckpointError: if the folder's model cannot be read.
        GraspError: if the card cannot be read or written.
    """
    card = folder / "README.md"
    found = inspect_checkpoint(folder)
    text = with_results(
        card.read_text(encoding="utf-8"),
        [results for path in sorted(folder.glob("*.json")) if (results := read_results(path)) is not None],
        parameters=found.parameters,
        before=found.report.before.parameters if found.report else found.dense_parameters,
    )
    write_whole(card, text)


def read_results(path: Path) -> dict[str, Any] | None:
    """What ``grasp evaluate`` wrote into a file; ``None`` if it holds anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    own = document.get("grasp", document) if isinstance(document, dict) else None
    known = isinstance(own, Mapping) and own.keys() >= {"model", "text", "result", "size"}
    return document if known else None
