"""Which figures there are of a compression and of what was measured, with their names and captions. Pure functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from grasp.checkpoint.compression_report import CompressionReport
from grasp.formatting import layer_ranges, share
from grasp.reporting import figures
from grasp.reporting.figure_data import Setting, by_latency, by_size, latencies, roofs
from grasp.reporting.figure_style import Draw

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from grasp.bench.results import Record


class Picture(NamedTuple):
    """A figure that can be drawn."""

    name: str  # of its file; no other of the same records has it
    title: str
    caption: str  # what the title leaves open: the conditions of a measurement
    draw: Draw


def of_layers(report: CompressionReport) -> Picture:
    """Block influence, those layers marked that were compressed."""
    title = "Block influence of the decoder layers"
    chosen = layer_ranges(report.redundant_layers) or "none"
    return Picture("block-influence", title, f"Compressed: {chosen}.", partial(figures.block_influence, report))


def of_spectra(report: CompressionReport) -> Iterator[tuple[int, Picture]]:
    """The singular values of each compressed layer that has some in the report."""
    for layer in sorted({module.layer for module in report.compressed if module.spectrum}):
        own = [module for module in report.compressed if module.layer == layer]
        kept = sum(module.parameters_after for module in own) / sum(module.parameters_before for module in own)
        title = f"Singular values of layer {layer}"
        caption = (
            f"The share of the groups that was kept along them is filled in; {share(kept)} of the parameters are left."
        )
        yield layer, Picture(f"spectrum-{layer}", title, caption, partial(figures.spectra, report, layer))


def of_results(records: Sequence[Record]) -> list[Picture]:
    """Every figure of measured results that these records have the data for."""
    sets: tuple[tuple[str, str, Mapping[Setting, Any], Callable[[Any], Figure]], ...] = (
        ("size", "Perplexity against size", by_size(records), figures.perplexity_by_size),
        ("latency", "Perplexity against latency", by_latency(records), figures.perplexity_by_latency),
        ("times", "Latency", latencies(records), figures.latency_bars),
        ("roofline", "What was reached of the device's limits", roofs(records), figures.roofline),
    )
    found = [
        Picture(
            f"{name}-{re.sub('[^a-z0-9]+', '-', setting.title.lower()).strip('-')}",
            f"{title}: {setting.title}",
            f"{setting.conditions}.",
            partial(draw, data),
        )
        for name, title, settings, draw in sets
        for setting, data in settings.items()
    ]
    names = [picture.name for picture in found]
    return [
        picture._replace(name=f"{picture.name}-{names[:index].count(picture.name) + 1}")
        if picture.name in names[:index]
        else picture
        for index, picture in enumerate(found)
    ]
