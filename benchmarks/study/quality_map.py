"""The map of the study: loss against decoding time or parameters, an interactive page of the documentation site.

``make docs`` writes it from the cells in ``benchmarks/results``.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.study.records import STUDY_RECORDS, StudyLatency, StudyResult
from grasp.bench.results import read_results
from grasp.bench.schema import Record, grouped
from grasp.reporting.figure_style import COLOURS

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

RESULTS = Path(__file__).parents[1] / "results"
STUDIES = {
    "SmolLM2-135M": ("study-smollm2.jsonl", "study-latency-smollm2.jsonl"),
    "Gemma-3-270M": ("study-gemma3-270m.jsonl", "study-latency-gemma3.jsonl"),
}
AXES = {"decoding time": "time", "parameters": "parameters"}  # what a button says, and the attribute of a point
_MARKERS = ("circle", "square", "triangle-up", "diamond", "cross", "x", "star")
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)


@dataclass(frozen=True)
class Point:
    """A method at one ratio."""

    method: str  # a row of ``METHODS``
    removed: float  # share of the decoder's parameters that was removed
    parameters: float  # parameters of the whole model over the dense model's
    time: float  # time per decoded token over the dense model's
    excess: float  # nats per token over the dense model; the mean over the seeds


def points(records: Sequence[Record]) -> Iterator[Point]:
    """The cells of a model's study whose eager decoding was timed with dense linears in PyTorch, in that order."""
    cells = [record for record in records if isinstance(record, StudyResult)]
    dense = next(cell.parameters for cell in cells if not cell.ratio)
    studied = grouped(cells, lambda cell: (cell.method, cell.ratio))
    for latency in records:
        if not isinstance(latency, StudyLatency) or latency.kernel or latency.mode != "eager" or not latency.ratio:
            continue
        if (latency.method, latency.ratio) in studied:
            seeds = studied[latency.method, latency.ratio]
            yield Point(
                method=latency.method,
                removed=statistics.mean(cell.removed for cell in seeds),
                parameters=statistics.mean(cell.parameters for cell in seeds) / dense,
                time=latency.of_dense,
                excess=statistics.mean(cell.excess for cell in seeds),
            )


def figure(panels: Mapping[str, Sequence[Point]]) -> Figure:
    """A panel for each model with a line for each method; a button chooses what the loss is drawn against."""
    from plotly.subplots import make_subplots

    result = make_subplots(1, len(panels), subplot_titles=list(panels), x_title="share of the dense model's")
    lines = {
        (column, method): sorted(line, key=lambda point: point.removed)
        for column, of_model in enumerate(panels.values(), start=1)
        for method, line in grouped(of_model, lambda point: point.method).items()
    }
    methods = list(dict.fromkeys(method for _, method in lines))
    for (column, method), line in lines.items():
        number = methods.index(method)
        result.add_scatter(
            row=1,
            col=column,
            x=_values(line, "time"),
            y=_values(line, "excess"),
            name=method,
            legendgroup=method,
            showlegend=column == 1,
            marker={"symbol": _MARKERS[number % len(_MARKERS)], "size": 9},
            line={"color": COLOURS[number % len(COLOURS)], "width": 3 if method == "best" else 1},
            hovertemplate=[_note(point) for point in line],
        )
    buttons = [
        {"label": label, "method": "restyle", "args": [{"x": [_values(line, name) for line in lines.values()]}]}
        for label, name in AXES.items()
    ]
    result.update_yaxes(type="log", tickvals=_TICKS)
    result.update_yaxes(title_text="nats per token over dense", col=1)
    result.update_layout(
        template="plotly_white",
        height=500,
        margin={"l": 60, "r": 10, "t": 80, "b": 60},
        legend={"orientation": "h", "y": -0.2},
        updatemenus=[
            {"type": "buttons", "direction": "right", "x": 0, "y": 1.25, "xanchor": "left", "buttons": buttons}
        ],
    )
    return result


def _values(line: Sequence[Point], name: str) -> list[float]:
    return [getattr(point, name) for point in line]


def _note(point: Point) -> str:
    """What the page says of a point."""
    return (
        f"<b>{point.method}</b>, {point.removed:.1%} of the decoder removed<br>{point.excess:.3f} nats over dense<br>"
        f"{point.time:.3f} of the dense time<br>{point.parameters:.3f} of the dense parameters<extra></extra>"
    )


def write_page(page: Path) -> None:
    """Write the page as HTML, and plotly's script into the same folder, which must exist."""
    panels = {
        model: list(points([record for file in files for record in read_results(RESULTS / file, STUDY_RECORDS)]))
        for model, files in STUDIES.items()
    }
    figure(panels).write_html(page, include_plotlyjs="directory", config={"displaylogo": False})
