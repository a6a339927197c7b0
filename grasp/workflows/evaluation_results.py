"""Result files of ``grasp evaluate``, and the model cards that show them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from grasp.checkpoint.card import read_card, read_evaluation, with_results
from grasp.checkpoint.inspection import Inspection, inspect_checkpoint
from grasp.errors import CheckpointError, ResultsError
from grasp.files import Contents, contents, require_writable, write_whole
from grasp.formatting import json_text
from grasp.reading import read_text_file

if TYPE_CHECKING:
    from grasp.workflows.evaluate import Evaluation


def require_replaceable(output: Path) -> Contents:
    """Check, before anything is measured, that results can be written to a file and into its folder's model card.

    Returns:
        The contents of the file, for ``write``.

    Raises:
        GraspError: if the file cannot be written.
        ResultsError: if the file is not an earlier result.
        CheckpointError: if the model card cannot be read.
    """
    require_writable(output)
    seen = contents(output)
    if output.exists() and read_evaluation(output) is None:
        raise ResultsError(f"{output} exists and holds no results of `grasp evaluate`; give another name")
    if _with_our_card(output.parent) is not None:
        read_card(read_text_file(output.parent / "README.md", "a model card in UTF-8", CheckpointError))
    return seen


def write(result: Evaluation, output: Path, seen: Contents | None = None) -> None:
    """Write results to a file; in the folder of a compressed checkpoint, the model card shows them.

    The file is complete or not written. With ``seen``, only these contents are replaced.

    Raises:
        GraspError: if a file cannot be written, or the card or the model cannot be read.
        OccupiedError: if the file does not have the contents ``seen``; the message has the name of the new file.
    """
    write_whole(output, json_text(result.to_dict()), seen=seen)
    folder = output.parent
    if (checkpoint := _with_our_card(folder)) is not None:
        card = with_results(
            read_text_file(folder / "README.md", "a model card in UTF-8", CheckpointError),
            [results for path in sorted(folder.glob("*.json")) if (results := read_evaluation(path)) is not None],
            # The files have buffers too, which are no parameters.
            parameters=checkpoint.parameters if checkpoint.report is None else checkpoint.report.after.parameters,
            before=checkpoint.parameters_before,
            is_quantized=bool(checkpoint.quantized),
        )
        write_whole(folder / "README.md", card)


def _with_our_card(folder: Path) -> Inspection | None:
    """The compressed checkpoint in a folder, if it has a model card. Cards of dense models are not changed."""
    names = ("README.md", "config.json")
    if not (all((folder / name).is_file() for name in names) and any(folder.glob("*.safetensors"))):
        return None
    checkpoint = inspect_checkpoint(folder)
    return checkpoint if checkpoint.is_compressed else None
