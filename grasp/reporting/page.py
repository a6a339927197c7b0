"""``grasp report``: one self-contained page about a compressed checkpoint and what was measured of it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from grasp.checkpoint.compression_report import CompressionReport, ModuleReport
from grasp.errors import GraspError, ResultsError
from grasp.files import write_whole
from grasp.formatting import count, layer_ranges, share, size
from grasp.reporting import rerun_command as reproduce
from grasp.reporting.catalog import Picture, of_layers, of_results, of_spectra
from grasp.reporting.figure_style import require_matplotlib, to_svg
from grasp.reporting.html import (
    Column,
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
from grasp.reporting.result_tables import HOW, require_same_model, result_table

if TYPE_CHECKING:
    from grasp.bench.results import Record


GENERATOR = "grasp report"
_SECTIONS = {
    "what": "What was done",
    "layers": "Which layers",
    "modules": "Ranks and sizes",
    "spectra": "Singular values",
    "results": "What was measured",
    "again": "How to make it again",
}
_MODULES = (
    Column("layer", lambda m: m.layer, str),
    Column("module", lambda m: _within_layer(m)),
    Column("block", lambda m: m.block),
    Column("out", lambda m: m.out_features, str),
    Column("in", lambda m: m.in_features, str),
    Column("rank", lambda m: m.rank, str),
    Column("full rank", lambda m: min(m.out_features, m.in_features), str),
    Column("parameters before", lambda m: m.parameters_before, count),
    Column("after", lambda m: m.parameters_after, count),
    Column("bytes before", lambda m: m.bytes_before, size),
    Column("after", lambda m: m.bytes_after, size),
    Column("kept", lambda m: m.parameters_after / m.parameters_before, share),
    Column("importance kept", lambda m: m.importance_kept, share),
)
_LEFT = (
    Column("layer", lambda m: m.layer, str),
    Column("module", lambda m: _within_layer(m)),
    Column("why it was left", lambda m: m.reason),
)


def write_report(directory: Path, output: Path, results: Sequence[Path] = ()) -> None:
    """Write the page of a checkpoint folder in one step; an earlier page of this function is replaced.

    Args:
        directory: with the ``report.json`` that ``grasp compress`` wrote.
        output: the page.
        results: files of JSON lines that the benchmarks or the study wrote.

    Raises:
        CheckpointError: if there is no report, or it cannot be read.
        ResultsError: if results cannot be read, or are of another model.
        MissingPackageError: if matplotlib is not installed.
        GraspError: if the page would take the place of anything else, or cannot be written.
    """
    require_matplotlib()
    report = CompressionReport.load(directory)
    name = directory.resolve().name
    records = list(_read(results, report, name))
    _require_replaceable(output)
    write_whole(output, render(report, name, records))


def render(report: CompressionReport, name: str, records: Sequence[Record] = ()) -> str:
    """The page as text.

    Args:
        report: of the compression.
        name: of the checkpoint folder.
        records: what was measured; of the same model.
    """
    model = str(report.request.get("model", "a model"))
    links = "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading in _SECTIONS.items())
    bodies = {
        "what": _what(report),
        "layers": _layers(report),
        "modules": _modules(report),
        "spectra": _spectra(report),
        "results": _results(records, str(report.request.get("model", "MODEL")), name),
        "again": _again(report, name),
    }
    what = f"Made from {model} by GRASP: low-rank where layers are redundant (arXiv 2501.00339)."
    head = f"<h1>{escape(name)}</h1>{paragraph(what)}{_key_numbers(report)}<nav>{links}</nav>"
    content = head + "".join(section(key, heading, bodies[key]) for key, heading in _SECTIONS.items())
    style, script = (files("grasp").joinpath(f"reporting/page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    return page(f"{name}: {model}, compressed", content, generator=GENERATOR, style=style, script=script)


def _shown(picture: Picture) -> str:
    return figure(to_svg(picture.draw, name=picture.name, title=picture.title), picture.title, picture.caption)


def _key_numbers(report: CompressionReport) -> str:
    before, after = report.before, report.after
    numbers = (
        (share(report.compression_ratio), "of the parameters removed"),
        (f"{count(before.parameters)} → {count(after.parameters)}", "parameters"),
        (f"{size(before.bytes)} → {size(after.bytes)}", "weights"),
        (f"{len(report.redundant_layers)} of {len(report.block_influence)}", "decoder layers low-rank"),
    )
    boxes = (f"<div><strong>{escape(number)}</strong>{escape(what)}</div>" for number, what in numbers)
    return f'<div class="key">{"".join(boxes)}</div>'


def _what(report: CompressionReport) -> str:
    calibration, request = report.calibration, report.request
    seconds = ", ".join(f"{step.replace('_', ' ')} {value:.1f} s" for step, value in report.seconds.items())
    known = [
        ("layers", layer_ranges(report.redundant_layers) or "none"),
        ("linears", f"{len(report.compressed)} replaced, {len(report.left)} left"),
        ("removed of the decoder layers", share(report.decoder_compression_ratio)),
        ("kept of each matrix", "" if report.retain_ratio is None else share(report.retain_ratio)),
        ("scope", report.scope),
        ("held-out loss", ", ".join(f"{scope} {loss:.4f}" for scope, loss in report.held_out_loss.items())),
        ("calibration text", str(request.get("calibration", ""))),
        ("calibration", f"{calibration.get('sequences')} sequences, {calibration.get('tokens')} tokens"),
        ("time", f"{sum(report.seconds.values()):.1f} s: {seconds}" if seconds else ""),
        ("versions", ", ".join(f"{name} {version}" for name, version in report.versions.items())),
    ]
    settings = [(key, _word(value)) for key, value in report.config.items() if value is not None]
    return facts(pair for pair in known if pair[1]) + "<h3>Configuration</h3>" + facts(settings)


def _within_layer(module: ModuleReport) -> str:
    return module.name.partition(f".{module.layer}.")[2] or module.name


def _word(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _layers(report: CompressionReport) -> str:
    text = paragraph(
        "Block influence is 1 less the cosine between a layer's input and its output, over the calibration tokens: "
        "what changes its input least is the most redundant."
    )
    return text + _shown(of_layers(report))


def _modules(report: CompressionReport) -> str:
    parts = [table("Linears that were made low-rank", _MODULES, report.compressed)] if report.compressed else []
    if report.left:
        parts.append(table("Modules of these layers that were left as they were", _LEFT, report.left))
    return "".join(parts) or paragraph("No layer was compressed.")


def _spectra(report: CompressionReport) -> str:
    pictures = list(of_spectra(report))
    if not pictures:
        return not_measured("the report has no singular values", "grasp compress MODEL -o NEW_FOLDER")
    text = paragraph(
        "The singular values of each matrix as it was, in the basis it was decomposed in, and how many of the groups "
        "were kept along them. Plain SVD would keep the left end whole."
    )
    return text + "".join(
        details(f"Layer {layer}", _shown(picture), is_open=picture is pictures[0][1]) for layer, picture in pictures
    )


def _results(records: Sequence[Record], model: str, name: str) -> str:
    drawn = "".join(map(_shown, of_results(records)))
    parts = [f'<div class="figures">{drawn}</div>' if drawn else ""]
    for kind, (what, how) in HOW.items():
        first = how.format(model=shlex.quote(model), folder=shlex.quote(name))
        again = f"{first}\ngrasp report {shlex.quote(name)} --results {kind}.jsonl"
        parts.append(result_table(kind, records) or not_measured(what, again))
    parts.append(result_table("not_measured", records))
    return "".join(parts)


def _again(report: CompressionReport, name: str) -> str:
    words = reproduce.command(report, name)
    digest = paragraph(f"SHA-256 of the calibration tokens: {report.calibration.get('sha256')}")
    if words is None:
        return (
            paragraph(
                "This was compressed from Python, where the model and the text have no name that the report could "
                "know. The configuration:"
            )
            + command(f"GraspConfig.from_dict({dict(report.config)})")
            + digest
        )
    made = f"With grasp {report.request.get('grasp')}"
    versions = "".join(f", {name} {version}" for name, version in report.versions.items())
    return (
        command(" \\\n  ".join(shlex.join(part) for part in reproduce.by_option(words)))
        + paragraph(
            f"{made}{versions}. Files and folders are named without the folders they lie in. The same tokens were "
            "drawn if report.json then has the same SHA-256."
        )
        + digest
    )


def _read(paths: Iterable[Path], report: CompressionReport, name: str) -> Iterator[Record]:
    """The records of all files, each checked to be of the model that was compressed."""
    for path in paths:
        from grasp.bench.results import read_results

        records = read_results(path)
        require_same_model(records, report.request.get("model"), name, report.before.parameters, path)
        try:
            of_results(records)
        except ValueError as error:  # values that a benchmark does not write
            raise ResultsError(f"{path}: {error}") from error
        yield from records


def _require_replaceable(output: Path) -> None:
    if output.exists():
        start = output.read_bytes()[:1000] if output.is_file() else b""
        if f'name="generator" content="{GENERATOR}"'.encode() not in start:
            raise GraspError(f"{output} exists and is no page of `{GENERATOR}`; give another name")
    elif not output.resolve().parent.is_dir():
        raise GraspError(f"the page cannot be written: there is no folder {output.resolve().parent}; make it first")
