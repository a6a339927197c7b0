from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle, StepPatch
from matplotlib.text import Text

from grasp.bench.percentiles import Percentiles
from grasp.checkpoint.compression_report import CompressionReport, spectrum_indices
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.reporting import figures
from grasp.reporting.figure_data import Latency, Load, Quality, Roof, Speed, Trade
from grasp.reporting.figure_style import themed
from tests.tiny_models import tiny_batches, tiny_model

LONG = "compressed with a method of a long name"


@pytest.fixture(scope="module")
def report() -> CompressionReport:
    return compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.4))


def line(figure: Figure, label: str, axes: int = 0) -> np.ndarray:
    """The places of the line of that name, (points, 2)."""
    (drawn,) = [drawn for drawn in figure.axes[axes].lines if drawn.get_label() == label]
    return np.array(drawn.get_xydata())


def latency(label: str, batch_size: int, ms: float) -> Latency:
    return Latency(label, batch_size, Percentiles(10 * ms, 12 * ms, 15 * ms), Percentiles(ms, 2 * ms, 3 * ms))


def test_block_influence_marks_the_layers_that_were_compressed(report: CompressionReport) -> None:
    figure = figures.block_influence(report)
    scores = report.block_influence
    assert line(figure, "compressed").tolist() == [[1, scores[1]], [2, scores[2]]]
    assert line(figure, "left dense").tolist() == [[0, scores[0]]]


def test_block_influence_of_no_layers_is_an_empty_figure(report: CompressionReport) -> None:
    empty = replace(report, block_influence=(), redundant_layers=())
    assert not figures.block_influence(empty).axes[0].lines


def test_the_parameters_that_linears_kept_by_layer(report: CompressionReport) -> None:
    def cells(report: CompressionReport) -> np.ndarray:
        (drawn,) = figures.parameters_kept(report).axes[0].collections
        return np.array(drawn.get_array()).reshape(7, 3)

    kept = cells(replace(report, removed_layers=(0,)))
    assert (kept[:, 0] == 0).all()  # removed
    module = report.compressed[0]
    assert kept[0, module.layer] == pytest.approx(module.parameters_after / module.parameters_before)
    assert (cells(report)[:, 0] == 1).all()  # dense


def test_linears_of_one_name_have_rows_of_their_own_but_experts_one(report: CompressionReport) -> None:
    paths = ("attn.c_proj", "mlp.c_proj", "mlp.experts.0.up", "mlp.experts.1.up")
    first = report.compressed[0]
    modules = [replace(first, name=f"h.{first.layer}.{path}", parameters_before=10) for path in paths]
    kept = [replace(module, parameters_after=after) for module, after in zip(modules, (2, 4, 1, 6), strict=True)]
    axes = figures.parameters_kept(replace(report, modules=tuple(kept))).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["attn.c_proj", "mlp.c_proj", "mlp.experts.up"]
    shares = np.array(axes.collections[0].get_array()).reshape(3, 3)
    assert shares[:, first.layer].tolist() == pytest.approx([0.2, 0.4, 0.35])


def test_a_spectrum_shows_all_values_and_where_groups_were_kept(report: CompressionReport) -> None:
    figure = figures.spectra(report, 2)
    modules = [module for module in report.compressed if module.layer == 2]
    assert len(modules) == 7
    for index, module in enumerate(modules):
        axes = figure.axes[index]
        groups = min(module.out_features, module.in_features)
        assert axes.get_title(loc="left") == f"{module.name.rpartition('.')[2]}: {module.rank} of {groups}"
        assert line(figure, "singular value", index)[:, 1].tolist() == list(module.spectrum)
        (kept,) = [patch for patch in axes.patches if isinstance(patch, StepPatch)]
        assert np.flatnonzero(kept.get_data().values).tolist() == list(module.indices)


def test_many_groups_are_drawn_as_shares_that_add_up_to_the_rank() -> None:
    groups = 500
    module = one_module(groups, kept=range(0, groups, 5))
    figure = figures.spectra(module, 0)
    (kept,) = [patch for patch in figure.axes[0].patches if isinstance(patch, StepPatch)]
    share, edges, _ = kept.get_data()
    assert len(share) < groups
    inside, _ = np.histogram(np.arange(groups), bins=edges)
    assert float((share * inside).sum()) == pytest.approx(groups / 5)


def one_module(groups: int, kept: Any) -> CompressionReport:
    report = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(0,), retain_ratio=0.4))
    spectrum = tuple(1.0 / (1 + index) for index in spectrum_indices(groups))
    module = replace(report.compressed[0], out_features=groups, in_features=groups, spectrum=spectrum)
    return replace(report, modules=(replace(module, indices=tuple(kept), rank=len(kept)),))


def test_a_layer_without_a_spectrum_is_refused(report: CompressionReport) -> None:
    with pytest.raises(ValueError, match="no spectrum of layer 0; compress again"):
        figures.spectra(report, 0)


def test_the_front_is_drawn_and_seeds_have_their_range() -> None:
    points = [
        Quality("dense", 4e6, 10, 10, 10),
        Quality("good", 2e6, 20, 18, 30),
        Quality("bad", 3e6, 25, 25, 25),
    ]
    figure = figures.perplexity_by_size(points)
    assert line(figure, "Pareto front").tolist() == [[2, 20], [4, 10]]
    (good,) = [bars for bars in figure.axes[0].containers if bars.get_label() == "good"]
    assert good.lines[2][0].get_segments()[0].tolist() == [[2, 18], [2, 30]]
    (bad,) = [bars for bars in figure.axes[0].containers if bars.get_label() == "bad"]
    assert not bad.has_yerr


def test_a_front_of_speed_is_drawn_for_each_cost() -> None:
    trades = [Trade("dense", 50, 200, 10.0), Trade("good", 80, 150, 12.0), Trade("bad", 40, 180, 15.0)]
    figure = figures.speed_by_cost([*trades, Trade("other", 90, 300, None)])
    assert line(figure, "Pareto front", 0).tolist() == [[10, 50], [12, 80]]
    assert line(figure, "Pareto front", 1).tolist() == [[150e-6, 80], [300e-6, 90]]
    assert "other" not in {drawn.get_label() for drawn in figure.axes[0].lines}
    assert line(figure, "other", 1).tolist() == [[300e-6, 90]]
    assert len(figures.speed_by_cost([Trade("other", 90, 300, None)]).axes) == 1


def test_bars_are_medians_and_whiskers_end_at_the_95th_percentile() -> None:
    figure = figures.latency_bars([latency("dense", 1, 2.0), latency("GRASP, cpu", 1, 1.0), latency("dense", 4, 3.0)])
    assert len(figure.axes) == 4
    widths = [[bar.get_width() for bar in axes.patches if isinstance(bar, Rectangle)] for axes in figure.axes]
    assert widths == [[20, 10], [2, 1], [30], [3]]
    assert [whisker.get_xdata()[-1] for whisker in figure.axes[0].lines] == [24, 12]


def test_a_roofline_bends_where_flops_and_bytes_take_the_same_time() -> None:
    figure = figures.roofline(Roof(100e9, 10e9, (Speed("cpu", 1.0, 8e9), Speed("cpu", 40.0, 60e9))))
    assert line(figure, "measured limit")[1].tolist() == [10, 100]
    limit = line(figure, "measured limit")
    assert limit[0, 1] == pytest.approx(limit[0, 0] * 10)
    assert limit[2, 1] == 100
    assert line(figure, "cpu").tolist() == [[1, 8], [40, 60]]


def test_a_line_joins_the_loads_of_a_server() -> None:
    figure = figures.serving_loads(
        [Load("dense", 1, 20.0, 50.0), Load("small", 1, 18.0, 55.0), Load("dense", 4, 25.0, 160.0)]
    )
    assert line(figure, "dense", 0).tolist() == [[1, 50], [4, 160]]
    assert line(figure, "dense", 1).tolist() == [[1, 20], [4, 25]]
    assert line(figure, "small", 1).tolist() == [[1, 18]]


def drawings(report: CompressionReport) -> dict[str, Any]:
    deep = replace(report, block_influence=tuple(0.9 * 0.93**i for i in range(126)))
    names = [*"abcdefghijk", LONG]
    many = [Quality(name, (i + 1) * 1e9, 10.0 * 1.7**i, 9.0 * 1.7**i, 12.0 * 1.7**i) for i, name in enumerate(names)]
    return {
        "block influence": lambda: figures.block_influence(deep),
        "spectra": lambda: figures.spectra(report, 1),
        "size": lambda: figures.perplexity_by_size(many),
        "one point": lambda: figures.perplexity_by_size(many[:1]),
        "speed": lambda: figures.speed_by_cost(
            [Trade(name, 40.0 + 9 * i, (300 - 20 * i) * 10**6, 28.0 * 1.1**i) for i, name in enumerate(names)]
        ),
        "bars": lambda: figures.latency_bars(
            [
                latency(name, batch, 900.0)
                for batch in (1, 16)
                for name in ("dense", "layers removed", "GRASP, reference")
            ]
        ),
        "one bar": lambda: figures.latency_bars([latency("dense", 1, 1e-3)]),
        "servers": lambda: figures.serving_loads(
            [Load(name, n, 900.0 + n, 1e4 / n) for name in names[-3:] for n in (1, 4, 16, 64)]
        ),
        "roofline": lambda: figures.roofline(
            Roof(989e12, 4.8e12, tuple(Speed(name, 0.5 * 2**i, 3e11 * 2**i) for i, name in enumerate(names[:7])))
        ),
    }


@pytest.mark.parametrize(
    "name", ["block influence", "spectra", "size", "one point", "speed", "bars", "one bar", "servers", "roofline"]
)
def test_no_text_is_cut_off_or_covers_another(report: CompressionReport, name: str) -> None:
    with themed("light"):
        figure = drawings(report)[name]()
        FigureCanvasAgg(figure).draw()
        boxes = {text: text.get_window_extent() for text in texts(figure) if text.get_text() and text.get_visible()}
    assert len(boxes) > 5
    for text, box in boxes.items():
        inside = figure.bbox.padded(1)
        assert inside.contains(box.x0, box.y0), text
        assert inside.contains(box.x1, box.y1), text
    for (one, box), (other, second) in itertools.combinations(boxes.items(), 2):
        assert not box.padded(-1).overlaps(second.padded(-1)), (one, other)


def texts(figure: Figure) -> Iterator[Text]:
    """All that is written; of the labels of ticks those within the limits, since matplotlib draws no others."""
    yield from figure.texts
    for legend in figure.legends:
        yield from legend.get_texts()
    for axes in figure.axes:
        if axes.axison:
            yield from (*axes.texts, axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label)
            for index, (axis, limits) in enumerate(((axes.xaxis, axes.get_xlim()), (axes.yaxis, axes.get_ylim()))):
                for label in axis.get_ticklabels():
                    if min(limits) <= label.get_position()[index] <= max(limits):
                        yield label
