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

Data = TypeVar("Data")
Result = TypeVar("Result", bound=Record)


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
    """One figure for each comparison. Its file name begins with ``name``, its title with ``title``."""
    return [
        Picture(
            f"{name}-{re.sub('[^a-z0-9]+', '-', comparison.title.lower()).strip('-')}",
            f"{title}: {comparison.title}",
            f"{comparison.conditions}.",
            partial(draw, data),
        )
        for comparison, data in comparisons.items()
    ]


def _by_comparison(
    name: str,
    title: str,
    compare: Callable[[Sequence[Result]], Mapping[Comparison, Data]],
    draw: Callable[[Data], Figure],
) -> Callable[[Sequence[Result]], list[Picture]]:
    """A function for ``Record.figures``; ``compare`` groups the results, the other arguments as ``of_comparisons``."""
    return lambda results: of_comparisons(name, title, compare(results), draw)


perplexity_by_size = _by_comparison("size", "Perplexity by size", figure_data.by_size, figures.perplexity_by_size)
speed_by_cost = _by_comparison("speed", "Speed by perplexity and size", figure_data.trades, figures.speed_by_cost)
latency_bars = _by_comparison("times", "Latency", figure_data.latencies, figures.latency_bars)
serving_loads = _by_comparison("servers", "Servers under load", figure_data.serving_loads, figures.serving_loads)
rooflines = _by_comparison("roofline", "Speed below the device's limits", figure_data.roofs, figures.roofline)
