"""``grasp report``: one self-contained page about a compressed checkpoint and its benchmark results."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from grasp.bench.results import read_results
from grasp.bench.schema import Record
from grasp.checkpoint.compression_report import KIND_COLUMNS, CompressionReport, candidate_columns, kinds_text
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.recovery_report import FILE_NAME as RECOVERY
from grasp.errors import GraspError, ResultsError
from grasp.files import Contents, contents, require_writable, write_whole
from grasp.formatting import Column, count, counts, layer_ranges, share, size
from grasp.reporting.figure_style import require_matplotlib, to_svg
from grasp.reporting.html import (
    command,
    details,
    escape,
    facts,
    figure,
    not_measured,
    page,
    paragraph,
    section,
    table,
)
from grasp.reporting.pictures import Picture, of_layers, of_parameters, of_results, of_spectra
from grasp.reporting.rerun_command import by_option, later_form, rerun_command
from grasp.reporting.result_tables import require_same_model, result_tables

GENERATOR = "grasp report"


_COMPRESSED = (
    Column("layer", "layer"),
    Column("module", "within_layer"),
    Column("block", "block"),
    Column("out", "out_features"),
    Column("in", "in_features"),
    Column("rank", "rank"),
    Column("full rank", lambda module: min(module.out_features, module.in_features)),
    Column("form", "form"),
    Column("parameters before", "parameters_before", count),
    Column("after", "parameters_after", count),
    Column("bytes before", "bytes_before", size),
    Column("after", "bytes_after", size),
    Column("parameters kept", lambda module: module.parameters_after / module.parameters_before, share),
    Column("importance kept", "importance_kept", share),
)
_LEFT = (
    Column("layer", "layer"),
    Column("module", "within_layer"),
    Column("reason", "reason"),
)


def write_report(directory: Path, output: Path, results: Sequence[Path] = ()) -> None:
    """Write the page of a checkpoint folder in one step; an earlier page of this function is replaced.

    Args:
        directory: folder with the ``report.json`` that ``grasp compress`` wrote.
        output: the page.
        results: files of JSON lines that ``grasp bench`` wrote.

    Raises:
        CheckpointError: if there is no report, or it cannot be read.
        ResultsError: if results cannot be read, or are of another model.
        MissingPackageError: if matplotlib is not installed.
        GraspError: if ``output`` exists and is not such a page, or cannot be written.
        OccupiedError: if another file appeared there meanwhile; the message has the name of the new page.
    """
    require_matplotlib()
    seen = _require_replaceable(output)
    report = CompressionReport.load(directory)
    folder = directory.resolve().name
    records = [record for path in results for record in _read(path, report, folder)]
    later = _later_steps(directory, report)
    write_whole(output, render(report, folder, records, later), seen=seen)


def _later_steps(directory: Path, report: CompressionReport) -> str:
    """What the report does not know: that the model was quantised or trained after the compression; or nothing."""
    has_model, as_compressed = (directory / "config.json").is_file(), report.config.get("bits") is None
    quantized = has_model and as_compressed and bool(inspect_checkpoint(directory).quantized)
    steps = ["quantised"] * quantized + ["trained"] * (directory / RECOVERY).is_file()
    if not steps:
        return ""
    return (
        f"The model was {' and '.join(steps)} after this compression. Losses and the command on this page are those of "
        "the compression alone; README.md says what changed."
    )


def render(report: CompressionReport, folder: str, records: Sequence[Record] = (), later: str = "") -> str:
    """The page of the checkpoint folder of that name as text.

    Args:
        report: of the compression.
        folder: its name.
        records: of the same model.
        later: what was done to the model afterwards.
    """
    model = str(report.request.get("model", "a model"))
    sections = {
        "Compression": _compression(report),
        "Block influence": _block_influence(report),
        "Ranks and sizes": _modules(report),
        "Singular values": _spectra(report),
        "Benchmarks": _benchmarks(records, str(report.request.get("model", "MODEL")), folder),
        "How to repeat it": _rerun(report, folder),
    }
    names = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = "".join(f'<a href="#{names[heading]}">{escape(heading)}</a>' for heading in sections)
    subtitle = paragraph(f"Compressed by GRASP from {model}: redundant layers are low-rank (arXiv 2501.00339).")
    subtitle += paragraph(later) if later else ""
    head = f"<h1>{escape(folder)}</h1>{subtitle}{_key_numbers(report)}<nav>{links}</nav>"
    content = head + "".join(section(names[heading], heading, body) for heading, body in sections.items())
    style, script = (files("grasp").joinpath(f"reporting/page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return page(f"{folder}: {model}, compressed", content, generator=GENERATOR, style=style, script=script)


def _svg_figure(picture: Picture) -> str:
    return figure(to_svg(picture.draw, name=picture.name, title=picture.title), picture.title, picture.caption)


def _key_numbers(report: CompressionReport) -> str:
    before, after = report.before, report.after
    numbers = (
        (share(report.compression_ratio), "of the parameters removed"),
        (f"{count(before.parameters)} → {count(after.parameters)}", "parameters"),
        (f"{size(before.bytes)} → {size(after.bytes)}", "weights"),
        (
            f"{len({module.layer for module in report.compressed})} of {len(report.block_influence)}",
            "decoder layers low-rank",
        ),
    )
    boxes = (f"<div><strong>{escape(number)}</strong>{escape(unit)}</div>" for number, unit in numbers)
    return f'<div class="key">{"".join(boxes)}</div>'


def _compression(report: CompressionReport) -> str:
    calibration, request = report.calibration, report.request
    seconds = ", ".join(f"{step.replace('_', ' ')} {value:.1f} s" for step, value in report.seconds.items())
    known = [
        ("layers", layer_ranges(report.redundant_layers) or "none"),
        ("removed layers", layer_ranges(report.removed_layers)),
        ("channels", report.channels_text),
        ("linears", f"{len(report.compressed)} low-rank, {len(report.left)} left dense"),
        ("forms", counts(module.form for module in report.compressed)),
        ("removed of the decoder layers", share(report.decoder_compression_ratio)),
        ("kept of each matrix", "" if report.retain_ratio is None else share(report.retain_ratio)),
        ("scope", report.scope),
        ("held-out loss", report.held_out_text),
        ("loss on kinds of text", kinds_text(report.kinds)),
        ("calibration text", str(request.get("calibration", ""))),
        ("calibration", f"{calibration.get('sequences')} sequences, {calibration.get('tokens')} tokens"),
        ("time", f"{sum(report.seconds.values()):.1f} s: {seconds}" if seconds else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    settings = [(key, _setting(value)) for key, value in report.config.items() if value is not None]
    tables = table("Candidates", candidate_columns(report.candidates), report.candidates) if report.candidates else ""
    tables += table("Kinds of text", KIND_COLUMNS, report.kinds) if report.kinds else ""
    return facts(pair for pair in known if pair[1]) + tables + "<h3>Configuration</h3>" + facts(settings)


def _setting(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _block_influence(report: CompressionReport) -> str:
    text = paragraph(
        "Block influence is 1 minus the cosine between the input and the output of a layer, averaged over the "
        "calibration tokens. The layer with the lowest value changes its input least and is the most redundant."
    )
    return text + _svg_figure(of_layers(report))


def _modules(report: CompressionReport) -> str:
    tables = []
    if report.compressed:
        tables += [_svg_figure(of_parameters(report)), table("Low-rank linears", _COMPRESSED, report.compressed)]
    if report.left:
        tables.append(table("Modules of these layers that were left dense", _LEFT, report.left))
    return "".join(tables) or paragraph("No layer was compressed.")


def _spectra(report: CompressionReport) -> str:
    pictures = list(of_spectra(report))
    if not pictures:
        return not_measured("the report has no singular values", "grasp compress MODEL -o NEW_FOLDER")
    text = paragraph(
        "The line is the singular values of each matrix before the compression, in the basis of its decomposition. "
        "The filled area is the share of groups that were kept. Plain SVD would keep all groups at the left end."
    )
    first = pictures[0][0]
    return text + "".join(
        details(f"Layer {layer}", _svg_figure(picture), is_open=layer == first) for layer, picture in pictures
    )


def _benchmarks(records: Sequence[Record], model: str, folder: str) -> str:
    svg_figures = "".join(map(_svg_figure, of_results(records)))
    figure_grid = f'<div class="figures">{svg_figures}</div>' if svg_figures else ""
    return figure_grid + "".join(result_tables(records, model, folder))


def _rerun(report: CompressionReport, folder: str) -> str:
    words = rerun_command(report, folder)
    digest = paragraph(f"SHA-256 of the calibration tokens: {report.calibration.get('sha256')}")
    if words is None:
        text = paragraph(
            "No command repeats this: it was compressed from Python, or with settings that the command line does not "
            "have. The configuration:"
        )
        return text + command(f"GraspConfig.from_dict({dict(report.config)})") + digest
    versions = "".join(f", {name} {version}" for name, version in report.versions.items())
    text = paragraph(
        f"Run with grasp {report.request.get('grasp')}{versions}. Files and folders are named without the folders that "
        "they lie in. If the new report.json has the same SHA-256, the same tokens were drawn."
    )
    lines = " \\\n  ".join(shlex.join(part) for part in by_option(words))
    if (form := later_form(report)) is not None:
        lines += f"\n{shlex.join(['grasp', 'convert', folder, '-o', f'{folder}-{form}', '--to', form])}"
    return command(lines) + text + digest


def _read(path: Path, report: CompressionReport, folder: str) -> list[Record]:
    """The records of a file, which must be of the model that was compressed."""
    records = read_results(path)
    require_same_model(records, report.request.get("model"), folder, report.before.parameters, path)
    try:
        of_results(records)
    except ValueError as error:  # values that a benchmark does not write
        raise ResultsError(f"{path}: {error}") from error
    return records


def _require_replaceable(output: Path) -> Contents:
    """Check that a page can be written, and return the contents of the page that it will replace."""
    require_writable(output)
    seen = contents(output)
    if seen and f'name="generator" content="{GENERATOR}"'.encode() not in output.read_bytes()[:1000]:
        raise GraspError(f"{output} exists and is not a page of `{GENERATOR}`; give another name")
    return seen
