from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import RunMain, assert_refused, save_tiny_model


def test_the_perplexity_of_a_broken_model_is_reported_not_dropped(text: Path, tmp_path: Path, main: RunMain) -> None:
    broken = save_tiny_model(tmp_path / "broken", nan=True)
    outcome = main("evaluate", broken, "--text", text, "--window", 64, "--json")
    result = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["result"]
    assert outcome.code == 2
    assert result["perplexity"] is None
    assert result["nonfinite"] == result["tokens"] > 0
    message = f"error: {result['tokens']} of {result['tokens']} tokens have a loss that is NaN or infinite"
    assert outcome.err.splitlines()[-1].startswith(message)
    table = main("evaluate", broken, "--text", text, "--window", 64)
    assert table.code == 2
    assert "perplexity" in table.out


def test_the_window_shown_is_the_one_used(model: Path, text: Path, main: RunMain) -> None:
    result = json.loads(main("evaluate", model, "--text", text, "--window", 5000, "--json").out)["result"]
    assert (result["window"], result["stride"]) == (128, 128)  # the positions that the model has
    assert "windows of 128, 128 new in each" in " ".join(
        main("evaluate", model, "--text", text, "--window", 5000).out.split()
    )


def test_options_of_tasks_need_tasks(main: RunMain) -> None:
    assert_refused(main("evaluate", "any", "--limit", 3), "--tasks-from and --limit need --tasks")
