"""The figures of a compression report and of benchmark results, as matplotlib's ``Figure``. Pure functions.

Call them inside ``grasp.reporting.figure_style.themed``, as its ``to_svg`` and ``to_png`` do.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np

from grasp.bench.schema import grouped
from grasp.checkpoint.compression_report import CompressionReport, ModuleReport, spectrum_indices
from grasp.checkpoint.inspection import short_name
from grasp.reporting.figure_data import Latency, Load, Quality, Roof, Speed, Stored, Trade, pareto_front
from grasp.reporting.figure_style import BLUE, COLOURS, GREY, MARKERS, PURPLE, VERMILLION, WIDTH

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure


_BINS = 48  # most bins of the singular groups of a module
_LABEL_WIDTH = 26  # characters; two columns of labels fit
_SMALLEST = 1e-7  # smaller singular values, as a share of the largest, are rounding errors of fp32
_NATS, _LINEAR_NATS = (0, 0.1, 0.2, 0.3, 0.4, 0.5, 2, 8), 0.5  # ticks, and up to which the axis is linear
_BAR_COLOURS = {"dense": GREY, "layers removed": PURPLE, "unfused": VERMILLION}
_HATCHES = {"layers removed": "//", "unfused": ".."}
_Looks = dict[str, tuple[str, str]]  # label → colour and marker


def block_influence(report: CompressionReport) -> Figure:
    """The block influence of every decoder layer; the compressed layers are marked."""
    from matplotlib.ticker import MaxNLocator

    figure, axes = _figure(3.0)
    scores = np.array(report.block_influence, dtype=float)
    compressed = np.isin(np.arange(len(scores)), report.redundant_layers)
    if len(scores) and scores.min() > 0:
        axes.set_yscale("log")
    low = scores.min() / 1.3 if axes.get_yscale() == "log" else scores.min(initial=0.0)
    for mask, colour, marker, label in (
        (~compressed, GREY, "o", "left dense"),
        (compressed, VERMILLION, "s", "compressed"),
    ):
        layers = np.flatnonzero(mask)
        if len(layers):
            axes.vlines(layers, low, scores[layers], colors=colour, linewidth=1.5)
            axes.plot(layers, scores[layers], marker, color=colour, markersize=5, label=label)
    axes.set_ylim(bottom=low)
    if axes.get_yscale() == "log":
        _plain_numbers(axes.yaxis)
    axes.set_xlabel("decoder layer")
    axes.set_ylabel("block influence")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(axis="x", visible=False)
    _legend(figure, axes)
    return figure


def parameters_kept(report: CompressionReport) -> Figure:
    """The share of the parameters that each linear kept: one row for each name, one column for each decoder layer.

    Low-rank experts share a row.
    """
    import matplotlib as mpl
    from matplotlib.ticker import PercentFormatter

    labels = [re.sub(r"\.\d+(?=\.)", "", module.within_layer) for module in report.compressed]
    names = list(dict.fromkeys(labels))
    before, after = np.zeros((2, len(names), len(report.block_influence)))
    for label, module in zip(labels, report.compressed, strict=True):
        before[names.index(label), module.layer] += module.parameters_before
        after[names.index(label), module.layer] += module.parameters_after
    kept = np.divide(after, before, out=np.ones_like(after), where=before > 0)
    kept[:, list(report.removed_layers)] = 0
    figure, axes = _figure(1.3 + 0.3 * len(names))
    colours = mpl.colormaps["cividis"].resampled(10)  # so few that nothing becomes a picture of pixels
    cells = axes.pcolormesh(kept, cmap=colours, vmin=0, vmax=1)
    axes.set_xticks(np.arange(0, kept.shape[1], max(1, kept.shape[1] // 8)) + 0.5)
    axes.xaxis.set_major_formatter(lambda place, _: f"{place - 0.5:.0f}")
    axes.set_yticks(np.arange(len(names)) + 0.5, names)
    axes.invert_yaxis()
    axes.set_xlabel("decoder layer")
    axes.grid(visible=False)
    figure.colorbar(cells, ax=axes, label="parameters kept", format=PercentFormatter(1))
    return figure


def spectra(report: CompressionReport, layer: int) -> Figure:
    """The singular values of each compressed linear of a layer, and the share of groups that was kept along them.

    Raises:
        ValueError: if the report has no spectrum of that layer.
    """
    modules = [module for module in report.compressed if module.layer == layer and module.spectrum]
    if not modules:
        raise ValueError(f"the report has no spectrum of layer {layer}; compress again with this version of grasp")
    rows = -(-len(modules) // 2)
    figure, grid = _panels(0.7 + 1.6 * rows, rows, 2)
    panels = grid.flatten()
    for axes, module in itertools.zip_longest(panels, modules):
        if module is None:
            axes.set_axis_off()
        else:
            _spectrum(axes, module)
    figure.supxlabel("singular group, the largest value first", fontsize=11)
    figure.supylabel("singular value", fontsize=11)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _spectrum(axes: Axes, module: ModuleReport) -> None:
    """One linear: its singular values as a line, the share of groups that was kept as a filled area."""
    groups = min(module.out_features, module.in_features)
    values = np.array(module.spectrum, dtype=float)
    values = np.where(values > _SMALLEST * values.max(initial=0.0), values, np.nan)
    bins = min(groups, _BINS)
    kept, edges = np.histogram(module.indices, bins=bins, range=(0, groups))
    total, _ = np.histogram(np.arange(groups), bins=bins, range=(0, groups))
    axes.stairs(
        kept / total,
        edges,
        fill=True,
        color=VERMILLION,
        alpha=0.7,
        transform=axes.get_xaxis_transform(),  # y from 0 to 1 over the height
        label="share kept (all: full height)",
    )
    axes.plot(spectrum_indices(groups), values, color=BLUE, linewidth=2, label="singular value")
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlim(0, groups)
    axes.set_title(f"{short_name(module.name)}: {module.rank} of {groups}", loc="left")


def perplexity_by_size(points: Sequence[Quality]) -> Figure:
    """Perplexity against parameters, in millions, with the Pareto front. Lower is better for both."""
    points = [point._replace(x=point.x / 1e6) for point in points]
    looks = _looks(points)
    figure, axes = _figure(3.2, labels=len(looks))
    _front(axes, pareto_front((point.x, point.perplexity) for point in points))
    for label, (colour, marker) in looks.items():
        same = [point for point in points if point.label == label]
        ends = [[point.perplexity - point.low for point in same], [point.high - point.perplexity for point in same]]
        axes.errorbar(
            [point.x for point in same],
            [point.perplexity for point in same],
            yerr=ends if np.any(ends) else None,
            fmt=marker,
            color=colour,
            markersize=6,
            capsize=2,
            label=label,
        )
    axes.set_yscale("log")
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("parameters, M")
    axes.set_ylabel("perplexity")
    _legend(figure, axes)
    return figure


def excess_by_bytes(models: Mapping[str, Sequence[Stored]]) -> Figure:
    """Nats over the dense model against bytes, one panel for each model, with its Pareto front.

    Nats are logarithmic above 0.5.
    """
    from matplotlib.ticker import NullLocator

    looks = _looks(itertools.chain.from_iterable(models.values()))
    figure, grid = _panels(2.2 * len(models) + 0.4, len(models), labels=len(looks), sharex=True)
    panels = grid[:, 0]
    for axes, (model, points) in zip(panels, models.items(), strict=True):
        _front(axes, pareto_front((point.of_dense * 100, point.excess) for point in points))
        _draw(axes, looks, ((point.label, point.of_dense * 100, point.excess) for point in points))
        highest = max(point.excess for point in points)
        axes.set_yscale("symlog", linthresh=_LINEAR_NATS, linscale=3)  # models that a rounding has ruined are far off
        axes.set_yticks([tick for tick in _NATS if tick <= highest])
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.set_ylim(
            min(point.excess for point in points) - 0.02, max((1.1 if highest < _LINEAR_NATS else 2) * highest, 0.1)
        )
        axes.set_title(model, loc="left")
        axes.set_ylabel("nats over dense")
    panels[-1].set_xlabel("bytes, % of the dense model in bfloat16")
    _legend(figure, *panels)
    return figure


def speed_by_cost(trades: Sequence[Trade]) -> Figure:
    """Tokens per second against perplexity and against bytes, each with its Pareto front: up and to the left is best.

    Without any perplexity there is one panel.
    """
    costs: dict[str, list[tuple[Trade, float]]] = {
        "perplexity": [(trade, trade.perplexity) for trade in trades if trade.perplexity is not None],
        "weights, MB": [(trade, trade.weight_bytes / 1e6) for trade in trades],
    }
    shown = {name: points for name, points in costs.items() if points}
    looks = _looks(trades)
    figure, [panels] = _panels(3.2, 1, len(shown), labels=len(trades) + 1, sharey=True)
    for axes, (xlabel, points) in zip(panels, shown.items(), strict=True):
        _front(axes, [(x, -y) for x, y in pareto_front((x, -trade.tokens_per_s) for trade, x in points)])
        _draw(axes, looks, ((trade.label, x, trade.tokens_per_s) for trade, x in points))
        axes.set_xlabel(xlabel)
    if len(shown) == 2:
        panels[0].set_xscale("log")
        _plain_numbers(panels[0].xaxis)
    panels[0].set_ylabel("decoded tokens/s")
    panels[0].set_ylim(bottom=0)
    _legend(figure, panels[-1])
    return figure


def latency_bars(bars: Sequence[Latency]) -> Figure:
    """Median time of the first and of further tokens, with whiskers to the 95th percentile, for each batch size."""
    batches = sorted({bar.batch_size for bar in bars})
    labels = list(dict.fromkeys(bar.label for bar in bars))
    figure, grid = _panels(0.5 + len(batches) * (0.7 + 0.32 * len(labels)), len(batches), 2, sharey=True)
    for batch, row in zip(batches, grid, strict=True):
        of_batch = {bar.label: bar for bar in bars if bar.batch_size == batch}
        row[0].set_ylabel(f"batch {batch}")
        for axes, name, title in zip(
            row, ("first_token", "inter_token"), ("first token", "further tokens"), strict=True
        ):
            for y, label in enumerate(labels):
                if label in of_batch:
                    _bar(axes, y, label, getattr(of_batch[label], name).p50, getattr(of_batch[label], name).p95)
            axes.set_title(title, loc="left")
            axes.set_xlim(0, 1.6 * max(getattr(bar, name).p95 for bar in of_batch.values()))
            axes.set_yticks(range(len(labels)), labels)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="y", visible=False)
    grid[0, 0].invert_yaxis()
    for axes in grid[-1]:
        axes.set_xlabel("ms")
    return figure


def _bar(axes: Axes, y: int, label: str, median: float, p95: float) -> None:
    colour = _BAR_COLOURS.get(label, BLUE)
    axes.barh(y, median, height=0.65, color=colour, hatch=_HATCHES.get(label), edgecolor="none")
    axes.plot([median, p95], [y, y], color=_ink(), linewidth=1.2)
    text = f"{median:.0f}" if median >= 100 else f"{median:.3g}"
    axes.annotate(text, (p95, y), xytext=(4, 0), textcoords="offset points", va="center", fontsize=10)


def serving_loads(loads: Sequence[Load]) -> Figure:
    """Tokens/s of all requests, and median ms per token of one request, by concurrency."""
    looks = _looks(loads)
    figure, [panels] = _panels(2.8, 1, 2, labels=len(looks))
    ticks = sorted({load.concurrency for load in loads})
    for axes, name, title in zip(
        panels, ("tokens_per_s", "output_token_ms"), ("tokens/s", "ms per token"), strict=True
    ):
        _draw(axes, looks, ((load.label, load.concurrency, getattr(load, name)) for load in loads), "-")
        axes.set_title(title, loc="left")
        axes.set_xscale("log")
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.set_xlabel("requests at a time")
    _legend(figure, panels[0])
    return figure


def roofline(roof: Roof) -> Figure:
    """FLOP/s against FLOPs per byte, below the measured limits of the device."""
    figure, axes = _figure(3.4)
    xs = [speed.intensity for speed in roof.speeds]
    ridge = roof.flops / roof.bandwidth
    ends = np.array([min(*xs, ridge) / 2, ridge, max(*xs, ridge) * 2])
    axes.plot(
        ends, np.minimum(ends * roof.bandwidth, roof.flops) / 1e9, color=_ink(), linewidth=1.5, label="measured limit"
    )
    places = ((speed.label, speed.intensity, speed.flops / 1e9) for speed in roof.speeds)
    _draw(axes, _looks(roof.speeds), places)
    axes.set_xscale("log")
    axes.set_yscale("log")
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.set_xlabel("FLOPs per byte that must be moved")
    axes.set_ylabel("GFLOP/s")
    _legend(figure, axes)
    return figure


def _figure(height: float, labels: int = 0) -> tuple[Figure, Axes]:
    figure, grid = _panels(height, labels=labels)
    return figure, grid[0, 0]


def _panels(height: float, rows: int = 1, columns: int = 1, *, labels: int = 0, **shared: Any) -> tuple[Figure, Any]:
    """A figure and its axes, (rows, columns); ``labels`` of a legend in two columns make it higher."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height + 0.2 * -(-labels // 2)))
    return figure, figure.subplots(rows, columns, squeeze=False, **shared)


def _front(axes: Axes, places: Sequence[tuple[float, float]]) -> None:
    axes.step(*zip(*places, strict=True), "--", where="post", color=GREY, label="Pareto front", zorder=1)


def _legend(figure: Figure, *panels: Axes) -> None:
    """One legend of all labels of some axes, each once."""
    legends = (zip(*axes.get_legend_handles_labels(), strict=True) for axes in panels)
    handles = {label: handle for handle, label in itertools.chain.from_iterable(legends)}
    names = [fill(label, _LABEL_WIDTH) for label in handles]
    figure.legend(list(handles.values()), names, loc="outside lower left", ncols=2)


def _looks(points: Iterable[Quality | Stored | Trade | Load | Speed]) -> _Looks:
    """Colour and marker of each label. Their numbers have no common factor, so no pair repeats before all are used."""
    labels = dict.fromkeys(point.label for point in points)
    return dict(zip(labels, zip(itertools.cycle(COLOURS), itertools.cycle(MARKERS), strict=False), strict=False))


def _draw(axes: Axes, looks: _Looks, places: Iterable[tuple[str, float, float]], line: str = "") -> None:
    """Draw points, (label, x, y), in the colour and with the marker of their label; ``line`` joins those of a label."""
    for label, same in grouped(places, lambda place: place[0]).items():
        colour, marker = looks[label]
        xs, ys = ([place[axis] for place in same] for axis in (1, 2))
        axes.plot(xs, ys, marker + line, color=colour, markersize=6, label=label)


def _ink() -> str:
    import matplotlib as mpl

    return str(mpl.rcParams["text.color"])


def _plain_numbers(axis: Axis) -> None:
    """Place the ticks of a logarithmic axis at a few round numbers, and write these without powers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    low, high = axis.get_view_interval()
    decades = float(np.log10(high / low))
    if decades < 0.7:
        axis.set_major_locator(MaxNLocator(4))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0,) if decades > 2 else (1.0, 2.0, 5.0), numticks=5))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
