"""A record class names its table, its columns and its figure: no other file has to know it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from matplotlib.figure import Figure

from grasp.bench.results import append_results, read_results
from grasp.bench.schema import Record
from grasp.cli import bench_tables
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.formatting import Column
from grasp.reporting.page import render
from grasp.reporting.pictures import Picture
from tests.tiny_models import tiny_batches, tiny_model


@dataclass(frozen=True)
class EnergyResult(Record):
    device: str
    provider: str
    joules: float | None

    kind: ClassVar[str] = "energy"
    title: ClassVar[str] = "Energy of a token"
    case: ClassVar[tuple[Column, ...]] = (Column("device", "device"),)
    columns: ClassVar[tuple[Column, ...]] = (
        Column("provider", "provider"),
        Column("energy", "joules", "{:.1f} J".format),
    )
    legend: ClassVar[str] = "Energy is read from the socket."
    figures: ClassVar[tuple[str, ...]] = (f"{__name__}:energies",)

    def notes(self) -> Iterator[str]:
        if self.joules is None:
            yield f"{self.provider} has no meter."


def energies(results: Sequence[EnergyResult]) -> list[Picture]:
    return [Picture("energy", "Energy", f"{len(results)} providers.", partial(bars, results))]


def bars(results: Sequence[EnergyResult]) -> Figure:
    figure = Figure()
    figure.subplots().bar([result.provider for result in results], [result.joules or 0.0 for result in results])
    return figure


RESULTS = [EnergyResult("a card", "dense", 2.54), EnergyResult("a card", "compressed", None)]


def test_a_new_record_is_read(tmp_path: Path) -> None:
    append_results(tmp_path / "energy.jsonl", RESULTS)
    assert read_results(tmp_path / "energy.jsonl", [EnergyResult]) == RESULTS


def test_a_new_record_has_a_table_in_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    bench_tables.show_results(RESULTS)
    bench_tables.show_notes(RESULTS)
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    assert lines[:2] == [["device", "a", "card"], ["provider", "energy"]]
    assert lines[3:5] == [["dense", "2.5", "J"], ["compressed"]]
    assert [" ".join(words) for words in lines[5:]] == [EnergyResult.legend, "compressed has no meter."]


def test_a_new_record_has_a_table_and_its_figure_on_the_page() -> None:
    report = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4))
    page = render(report, "small", RESULTS)
    varied = render(report, "small", [*RESULTS, EnergyResult("another card", "dense", 2.0)])
    assert "<h3>Energy of a token</h3><p>All rows: device a card.</p>" in page
    assert '<tr><td>dense</td><td class="number" data-value="2.54">2.5 J</td></tr>' in page
    assert "<tr><td>compressed</td><td></td></tr>" in page
    assert "<p>Energy is read from the socket.</p><p>compressed has no meter.</p>" in page
    assert "<strong>Energy</strong><br>2 providers." in page
    assert 'aria-label="Energy"' in page
    assert "<tr><td>another card</td><td>dense</td>" in varied
