from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command_line import RunMain


def test_compress_evaluate_and_inspect_agree_with_each_other(
    model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    out = tmp_path / "small"
    options = ["--num-samples", 3, "--seq-len", 32, "--layers", "0,2", "--retain-ratio", 0.4, "--batch-size", 2]
    options += ["--preset", "paper"]  # which removes no layer, so that inspect counts all dense parameters
    compressed = json.loads(main("compress", model, "-o", out, "--calibration", text, *options, "--json").out)
    report = compressed["report"]
    assert report["redundant_layers"] == [0, 2]
    assert report["config"]["retain_ratio"] == 0.4
    assert report["calibration"]["sequences"] == 3
    assert compressed["samples"] == {
        "source": str(text),
        "num_samples": 3,
        "seq_len": 32,
        "batch_size": 2,
        "seed": 0,
    }
    assert json.loads((out / "report.json").read_text()) == report

    evaluated = json.loads(main("evaluate", out, "--text", text, "--window", 64, "--json").out)
    assert evaluated["size"]["parameters"] == report["after"]["parameters"]
    assert evaluated["size"]["bytes"] == report["after"]["bytes"]
    assert 1 < evaluated["result"]["perplexity"] < 10_000

    inspected = json.loads(main("inspect", out, "--json").out)
    assert inspected["parameters"] == report["after"]["parameters"]
    assert inspected["dense_parameters"] == report["before"]["parameters"]
    assert inspected["compression_ratio"] == pytest.approx(report["compression_ratio"])
    ranks = {module["name"]: module["rank"] for module in inspected["modules"]}
    assert ranks == {module["name"]: module["rank"] for module in report["modules"] if not module["reason"]}
