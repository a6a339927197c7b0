"""The figures of a compression and of benchmark results, with their names and captions. Pure functions.

The functions that take results are named by the record classes of ``grasp.bench.records``.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pkgutil import resolve_name
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from grasp.bench.schema import Record, grouped
from grasp.checkpoint.compression_report import CompressionReport
from grasp.formatting import layer_ranges, share
from grasp.reporting import figure_data, figures
from grasp.reporting.figure_data import Comparison
from grasp.reporting.figure_style import Draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grasp.bench.records import ModelResult, OpResult
    from grasp.bench.serve_records import ServeResult

Data = TypeVar("Data")


class Picture(NamedTuple):
    """A figure that can be drawn."""

    name: str  # of its file; unique among the figures of the same records
    title: str
    caption: str
    draw: Draw


def of_layers(report: CompressionReport) -> Picture:
    """Block influence of all layers; the compressed layers are marked."""
    title = "Block influence of the decoder layers"
    compressed = layer_ranges(report.redundant_layers) or "none"
    return Picture("block-influence", title, f"Compressed: {compressed}.", partial(figures.block_influence, report))


def of_parameters(report: CompressionReport) -> Picture:
    """The share of the parameters that each linear kept."""
    removed = layer_ranges(report.removed_layers)
    caption = f"Layers that were removed, {removed}, kept none." if removed else "Linears that are dense kept all."
    return Picture("parameters-kept", "Parameters kept", caption, partial(figures.parameters_kept, report))


def of_spectra(report: CompressionReport) -> Iterator[tuple[int, Picture]]:
    """The singular values of each compressed layer that has them in the report."""
    for layer in sorted({module.layer for module in report.compressed if module.spectrum}):
        modules = [module for module in report.compressed if module.layer == layer]
        kept = sum(module.parameters_after for module in modules) / sum(module.parameters_before for module in modules)
        title = f"Singular values of layer {layer}"
        caption = f"The filled area is the share of groups that were kept. {share(kept)} of the parameters are left."
        yield layer, Picture(f"spectrum-{layer}", title, caption, partial(figures.spectra, report, layer))


def of_results(records: Sequence[Record]) -> list[Picture]:
    """Every figure that the classes of these records name and that the records have the data for.

    Raises:
        ValueError: if a record has values that its benchmark does not write.
    """
    pictures: list[Picture] = []
    names: Counter[str] = Counter()
    for record_class, of_class in grouped(records, lambda record: type(record)).items():
        for function in record_class.figures:
            for picture in resolve_name(function)(of_class):
                names[picture.name] += 1
                number = f"-{names[picture.name]}" if names[picture.name] > 1 else ""
                pictures.append(picture._replace(name=picture.name + number))
    return pictures


def of_comparisons(
    name: str, title: str, comparisons: Mapping[Comparison, Data], draw: Callable[[Data], Figure]
) -> list[Picture]:
    """One figure for each comparison.

    Args:
        name: start of the file names.
        title: start of the titles.
        comparisons: data of each figure.
        draw: makes a figure from its data.
    """
    return [
        Picture(
            f"{name}-{re.sub('[^a-z0-9]+', '-', comparison.title.lower()).strip('-')}",
            f"{title}: {comparison.title}",
            f"{comparison.conditions}.",
            partial(draw, data),
        )
        for comparison, data in comparisons.items()
    ]


def perplexity_by_size(results: Sequence[ModelResult]) -> list[Picture]:
    """Perplexity against parameters, one figure for each model and text."""
    data = figure_data.by_size(results)
    return of_comparisons("size", "Perplexity by size", data, figures.perplexity_by_size)


def speed_by_cost(results: Sequence[ModelResult]) -> list[Picture]:
    """Tokens per second against perplexity and bytes, one figure for each model, prompt and batch size."""
    data = figure_data.trades(results)
    return of_comparisons("speed", "Speed by perplexity and size", data, figures.speed_by_cost)


def latency_bars(results: Sequence[ModelResult]) -> list[Picture]:
    """Times of the first and of further tokens, one figure for each model and prompt."""
    return of_comparisons("times", "Latency", figure_data.latencies(results), figures.latency_bars)


def serving_loads(results: Sequence[ServeResult]) -> list[Picture]:
    """Tokens/s and time per token of each server by concurrency, one figure for each model and length of requests."""
    return of_comparisons("servers", "Servers under load", figure_data.serving_loads(results), figures.serving_loads)


def rooflines(results: Sequence[OpResult]) -> list[Picture]:
    """Speed by FLOPs per byte, one figure for each op, dtype and device."""
    return of_comparisons("roofline", "Speed below the device's limits", figure_data.roofs(results), figures.roofline)
