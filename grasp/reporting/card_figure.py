"""The figure of a model card: the share of its parameters that each linear kept."""

from __future__ import annotations

from pathlib import Path

from grasp.checkpoint import compression_report
from grasp.checkpoint.card import FIGURE, with_figure
from grasp.checkpoint.compression_report import CompressionReport
from grasp.errors import CheckpointError
from grasp.files import contents, write_whole
from grasp.reading import read_text_file
from grasp.reporting.figure_style import require_matplotlib, to_png
from grasp.reporting.pictures import of_parameters


def add_figure(folder: Path) -> None:
    """Draw the figure into a checkpoint folder, and show it in the folder's card.

    Nothing is drawn for a folder that has no report, no low-rank linears or no card with their table.

    Raises:
        MissingPackageError: if matplotlib is not installed.
        CheckpointError: if the report or the card cannot be read.
        GraspError: if a file cannot be written.
    """
    card, file = folder / "README.md", folder / FIGURE
    if not (folder / compression_report.FILE_NAME).is_file() or not card.is_file():
        return
    report = CompressionReport.load(folder)
    picture = of_parameters(report)
    text = read_text_file(card, "a model card in UTF-8", CheckpointError)
    shown = with_figure(text, picture.title, picture.caption)
    if not report.compressed or FIGURE not in shown:
        return
    require_matplotlib()
    write_whole(file, to_png(picture.draw, "light"), seen=contents(file))
    if shown != text:
        write_whole(card, shown, seen=contents(card))
