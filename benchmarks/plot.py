"""Draw every figure that compressed folders and result files have the data for, as SVG and PNG."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.study.records import STUDY_RECORDS
from grasp.bench.results import read_results
from grasp.bench.schema import Record
from grasp.checkpoint.compression_report import FILE_NAME, CompressionReport
from grasp.errors import GraspError
from grasp.files import write_whole
from grasp.reporting.figure_style import THEMES, require_matplotlib, standalone, to_png, to_svg
from grasp.reporting.pictures import Picture, of_layers, of_results, of_spectra

PLOTS = Path(__file__).with_name("plots")


def pictures(paths: Sequence[Path]) -> Iterator[Picture]:
    """The figures of compressed folders or their ``report.json``, and of files of JSON lines.

    Raises:
        GraspError: if a file cannot be read.
    """
    records: list[Record] = []
    for path in paths:
        if path.is_dir() or path.name == FILE_NAME:
            report = CompressionReport.load(path if path.is_dir() else path.parent)
            yield of_layers(report)
            yield from (picture for _, picture in of_spectra(report))
        else:
            records += read_results(path, STUDY_RECORDS)
    yield from of_results(records)


def write(picture: Picture, folder: Path) -> list[Path]:
    """Write one SVG, which follows the reader's choice of light or dark, and a PNG for each theme."""
    svg = standalone(to_svg(picture.draw, name=picture.name, title=picture.title))
    files = {f"{picture.name}.svg": svg.encode()}
    files |= {f"{picture.name}-{theme}.png": to_png(picture.draw, theme) for theme in THEMES}
    for name, content in files.items():
        write_whole(folder / name, content)
    return [folder / name for name in files]


def main(
    results: Annotated[list[Path], typer.Argument(help="Compressed folders, and files of JSON lines.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Folder; files of the same names are replaced.")
    ] = PLOTS,
) -> None:
    """Draw the figures of results.

    Example: python -m benchmarks.plot small model.jsonl ops.jsonl
    """
    try:
        require_matplotlib()
        drawable = list(pictures(results))
        output.mkdir(parents=True, exist_ok=True)
        for picture in drawable:
            print(f"{picture.title}. {picture.caption}", *write(picture, output), sep="\n  ")
    except (GraspError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    typer.run(main)
