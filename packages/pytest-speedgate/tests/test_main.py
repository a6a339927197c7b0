"""``python -m speedgate``, on documents that earlier versions of the plugin recorded."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speedgate import baselines
from speedgate.__main__ import main

DATA = Path(__file__).parent / "data"
Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run ``python -m speedgate`` in this process: its exit code, and all that it printed."""
    return lambda *arguments: (main([*map(str, arguments)]), "".join(capsys.readouterr()))


def test_recorded_runs_that_are_alike_pass(run: Run) -> None:
    code, output = run("compare", DATA / "baseline.json", DATA / "unchanged.json")
    assert code == 0, output
    assert output == "2 compared: 0 regression, 0 unclear, 0 better, 2 same; 0 lost, 0 new\n"


def test_a_recorded_slowdown_is_named_and_nothing_else(run: Run) -> None:
    code, output = run("compare", DATA / "baseline.json", DATA / "slowed.json")
    regression, tally = output.splitlines()
    assert code == 1
    assert regression.startswith("regression: lowrank_glu ")
    assert tally.startswith("2 compared: 1 regression, 0 unclear, 0 better, 1 same")


def test_a_higher_threshold_lets_the_recorded_slowdown_pass(run: Run) -> None:
    code, output = run("compare", DATA / "baseline.json", DATA / "slowed.json", "--threshold", "0.6")
    assert code == 0, output


@pytest.mark.parametrize("threshold", ["nan", "-1", "0", "inf"])
def test_a_threshold_that_judges_nothing_is_refused(threshold: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["compare", str(DATA / "baseline.json"), str(DATA / "slowed.json"), f"--threshold={threshold}"])
    assert f"expected a fraction above 0, such as 0.15, got {threshold}" in capsys.readouterr().err


def test_an_export_of_a_recorded_run_is_a_list_of_its_ratios(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "ratios.json"
    assert run("export", DATA / "baseline.json", "-o", path)[0] == 0
    labels = [entry.label for entry in baselines.read(DATA / "baseline.json").entries.values()]
    assert [row["name"] for row in json.loads(path.read_text())] == labels
    assert [path.name for path in tmp_path.iterdir()] == ["ratios.json"]


def test_an_export_of_a_damaged_document_overwrites_nothing(tmp_path: Path, run: Run) -> None:
    path, damaged = tmp_path / "ratios.json", tmp_path / "damaged.json"
    path.write_text('"kept"')
    damaged.write_text("{}")
    code, output = run("export", damaged, "-o", path)
    assert code == 2
    assert "damaged.json is damaged" in output
    assert json.loads(path.read_text()) == "kept"
