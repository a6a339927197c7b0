from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp.checkpoint.compression_report import CompressionReport
from grasp.config import GraspConfig
from grasp.errors import CheckpointError
from grasp.loading import load_quietly
from grasp.model.layer_removal import remove_layers_
from grasp.workflows.demo import (
    BEST,
    DENSE,
    GRASP,
    PLAIN_SVD,
    REMOVED,
    DemoSizes,
    Row,
    findings,
    run_demo,
)
from tests.command_line import save_tiny_model

SIZES = DemoSizes(
    num_samples=2, seq_len=32, num_layers=1, windows=2, window=32, prompt_tokens=8, new_tokens=2, repeats=2
)


@pytest.fixture
def tiny_builtin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model in the place of the built-in one."""
    folder = save_tiny_model(tmp_path / "builtin")

    def load(*_: Any, **__: Any) -> tuple[Any, Any]:
        return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)

    monkeypatch.setattr("grasp.workflows.demo.load_quietly", load)


def rows(perplexities: dict[str, float], speeds: dict[str, float] | None = None) -> list[Row]:
    speeds = dict.fromkeys(perplexities, 100.0) | (speeds or {})
    parameters = {DENSE: 1000, BEST: 850, REMOVED: 800, GRASP: 850, PLAIN_SVD: 850}
    return [Row(name, parameters[name], 0, perplexities[name], speeds[name], speeds[name]) for name in perplexities]


def test_findings_say_that_grasp_loses_where_the_numbers_do() -> None:
    text = findings(rows({DENSE: 10.0, BEST: 15.0, REMOVED: 20.0, GRASP: 30.0, PLAIN_SVD: 40.0}))[0]
    assert "best first: best 15.0, layers removed 20.0, GRASP 30.0, plain SVD 40.0" in text
    assert "higher perplexity here than removing the layers" in text
    assert "by gradient is better" in text


def test_findings_say_that_grasp_wins_where_the_numbers_do() -> None:
    text = findings(rows({DENSE: 10.0, BEST: 15.0, REMOVED: 50.0, GRASP: 30.0, PLAIN_SVD: 25.0}))[0]
    assert "best first: best 15.0, plain SVD 25.0, GRASP 30.0, layers removed 50.0" in text
    assert "lower perplexity here than removing the layers" in text
    assert "by gradient is not better" in text


@pytest.mark.parametrize(
    ("speeds", "noise", "verdict"),
    [
        ({REMOVED: 130.0, GRASP: 120.0, PLAIN_SVD: 120.0}, "3%", "layers removed is fastest"),
        ({REMOVED: 122.0, GRASP: 120.0, PLAIN_SVD: 119.0}, "3%", "layers removed, GRASP and plain SVD are too close"),
        ({REMOVED: 119.0, GRASP: 107.0, PLAIN_SVD: 150.0}, "40%", "layers removed, GRASP and plain SVD are too close"),
        ({DENSE: 200.0}, "3%", "dense is fastest"),
    ],
)
def test_findings_take_the_difference_between_equal_shapes_for_noise(
    speeds: dict[str, float], noise: str, verdict: str
) -> None:
    _, _, prefill, decode = findings(rows(dict.fromkeys((DENSE, BEST, REMOVED, GRASP, PLAIN_SVD), 1.0), speeds))
    assert prefill.startswith("Prefill speed relative to dense: best ")
    for text in (prefill, decode):
        assert f"differences up to {noise} count as noise" in text
        assert verdict in text


def test_sizes_removed_are_shares_of_the_dense_model() -> None:
    text = findings(rows(dict.fromkeys((DENSE, BEST, REMOVED, GRASP, PLAIN_SVD), 1.0)))[1]
    assert "removing layers saves 20.0% of the parameters, the others 15.0%" in text


@pytest.mark.usefixtures("tiny_builtin")
def test_the_demo_writes_checkpoint_report_and_table_and_replaces_only_its_own(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    demo = run_demo(out, SIZES)
    assert [row.name for row in demo.rows] == [DENSE, BEST, REMOVED, GRASP, PLAIN_SVD]
    by_name = {row.name: row for row in demo.rows}
    assert by_name[DENSE].parameters == demo.report.before.parameters
    assert by_name[BEST].parameters == demo.report.after.parameters
    assert by_name[GRASP].parameters == by_name[PLAIN_SVD].parameters
    assert by_name[BEST].parameters <= 1.01 * by_name[GRASP].parameters  # fewer if layers are removed
    assert by_name[REMOVED].parameters < by_name[GRASP].parameters < by_name[DENSE].parameters
    assert len({row.perplexity for row in demo.rows}) >= 4
    assert all(row.prefill_tokens_per_s > 0 and row.decode_tokens_per_s > 0 for row in demo.rows)
    assert json.loads((out / "demo.json").read_text()) == demo.to_dict()
    assert CompressionReport.load(out) == demo.report
    reloaded = AutoModelForCausalLM.from_pretrained(out)
    assert sum(parameter.numel() for parameter in reloaded.parameters()) == by_name[BEST].parameters

    again = run_demo(out, SIZES)
    assert [row.perplexity for row in again.rows] == [row.perplexity for row in demo.rows]
    assert json.loads((out / "demo.json").read_text()) == again.to_dict()
    assert {path.name for path in tmp_path.iterdir()} == {"builtin", "demo"}

    (out / "demo.json").unlink()
    with pytest.raises(CheckpointError, match="is not empty"):
        run_demo(out, SIZES)
    assert (out / "report.json").is_file()


@pytest.mark.slow
def test_the_demo_runs_on_six_layers_of_the_model_it_is_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **options: Any) -> tuple[Any, Any]:
        model, tokenizer = load_quietly(*args, **options)
        remove_layers_(model, range(3, 27))
        return model, tokenizer

    monkeypatch.setattr("grasp.workflows.demo.load_quietly", load)
    redundant = dataclasses.replace(GraspConfig.best(), scope="redundant")  # 42 matrices take long
    monkeypatch.setattr(GraspConfig, "best", lambda **options: dataclasses.replace(redundant, **options))
    steps: list[str] = []
    demo = run_demo(tmp_path / "demo", SIZES, progress=lambda step, done, total: steps.append(step))
    assert demo.conditions["model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert demo.rows[0].parameters == 134_515_008 - 24 * 3_540_096
    assert all(1 < row.perplexity < float("inf") for row in demo.rows)
    assert {"loading builtin", "block influence", "perplexity dense", "speed", "saving"} <= set(steps)
