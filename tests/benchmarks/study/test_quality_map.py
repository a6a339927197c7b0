from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.study import quality_map
from benchmarks.study.quality_map import Point, figure, points, write_page
from benchmarks.study.records import StudyLatency, StudyResult
from tests.bench.records import record

DENSE = record(StudyResult, method="dense", ratio=0.0, parameters=200)


def test_a_point_is_the_mean_over_the_seeds_with_the_time_of_one() -> None:
    cells = [
        record(StudyResult, method="best", ratio=0.2, seed=seed, removed=0.2, parameters=100, excess=excess)
        for seed, excess in enumerate((0.1, 0.3))
    ]
    times = [
        record(StudyLatency, method=method, ratio=ratio, of_dense=of_dense, kernel=kernel, mode=mode)
        for method, ratio, of_dense, kernel, mode in (
            ("dense", 0.0, 1.0, False, "eager"),
            ("best", 0.2, 0.5, False, "eager"),
            ("best", 0.2, 0.4, True, "eager"),
            ("best", 0.2, 0.3, False, "compiled"),
        )
    ]
    assert list(points([DENSE, *cells, *times])) == [Point("best", 0.2, 0.5, 0.5, pytest.approx(0.2))]


def test_what_was_measured_in_one_way_only_is_no_point() -> None:
    assert not list(points([DENSE, record(StudyResult, ratio=0.2), record(StudyLatency, ratio=0.3)]))


def test_a_button_draws_the_loss_against_the_parameters() -> None:
    small, large = Point("best", 0.3, 0.7, 0.55, 0.6), Point("best", 0.1, 0.9, 0.65, 0.05)
    drawn = figure({"one": [small, large], "other": [Point("plain SVD", 0.3, 0.7, 0.8, 3.0)]})
    assert [trace.x for trace in drawn.data] == [(0.65, 0.55), (0.8,)]
    assert [trace.y for trace in drawn.data] == [(0.05, 0.6), (3.0,)]
    button = drawn.layout.updatemenus[0].buttons[1]
    assert (button.label, button.args[0]["x"]) == ("parameters", [[0.9, 0.7], [0.7]])


def test_the_page_has_every_studied_method_of_each_model(tmp_path: Path) -> None:
    write_page(tmp_path / "map.html")
    page = (tmp_path / "map.html").read_text(encoding="utf-8")
    assert all(f'"{name}"' in page for name in (*quality_map.STUDIES, "best", "layers removed"))
    assert (tmp_path / "plotly.min.js").exists()
