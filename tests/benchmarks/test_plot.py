from __future__ import annotations

from pathlib import Path
from xml.etree import ElementTree

import pytest

from benchmarks import plot
from benchmarks.study.records import StudyResult
from grasp.bench.records import ModelResult
from grasp.bench.results import append_results
from grasp.compress import compress_
from grasp.config import GraspConfig
from tests.bench.records import record
from tests.command_line import run_script
from tests.tiny_models import tiny_batches, tiny_model


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """A compressed folder, as far as figures are concerned, and results."""
    report = compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(layers=(1,), retain_ratio=0.4))
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "report.json").write_text(report.to_json())
    append_results(tmp_path / "results.jsonl", [record(ModelResult, provider="dense"), record(StudyResult)])
    return [str(tmp_path / "small"), str(tmp_path / "results.jsonl")]


def test_every_figure_is_an_svg_and_two_pngs(inputs: list[str], tmp_path: Path) -> None:
    result = run_script(plot.main, *inputs, "-o", tmp_path / "plots")
    assert result.exit_code == 0
    files = sorted(path.name for path in (tmp_path / "plots").iterdir())
    drawings = [name.removesuffix(".svg") for name in files if name.endswith(".svg")]
    assert {"block-influence", "spectrum-1", "times-a-prompt-of-3-tokens-after-3"} <= set(drawings)
    assert len(drawings) == 6  # those, perplexity by size on two texts, and by latency
    assert files == sorted(f"{name}{end}" for name in drawings for end in (".svg", "-light.png", "-dark.png"))
    for name in drawings:
        ElementTree.parse(tmp_path / "plots" / f"{name}.svg")
        assert f"{name}.svg" in result.output
        light, dark = ((tmp_path / "plots" / f"{name}-{theme}.png").read_bytes() for theme in ("light", "dark"))
        assert light != dark


def test_the_same_files_give_the_same_figures(inputs: list[str], tmp_path: Path) -> None:
    for folder in ("one", "two"):
        assert run_script(plot.main, inputs[0], "-o", tmp_path / folder).exit_code == 0
    assert list((tmp_path / "one").iterdir())
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


@pytest.mark.parametrize("bad", ["missing.jsonl", "corrupt.jsonl", "empty"])
def test_bad_input_leaves_the_figures_as_they_were(bad: str, inputs: list[str], tmp_path: Path) -> None:
    (tmp_path / "corrupt.jsonl").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "plots").mkdir()
    (tmp_path / "plots" / "block-influence.svg").write_text("earlier")
    result = run_script(plot.main, *inputs, tmp_path / bad, "-o", tmp_path / "plots")
    assert result.exit_code == 2
    assert bad in result.output
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["block-influence.svg"]
    assert (tmp_path / "plots" / "block-influence.svg").read_text() == "earlier"
