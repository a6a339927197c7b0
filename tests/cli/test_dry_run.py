from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.command_line import RunMain


def test_a_dry_run_says_what_it_would_take_and_reads_no_weights(main: RunMain, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    asked = (
        "compress",
        bare,
        "-o",
        tmp_path / "out",
        "--layers",
        "0,2",
        "--num-samples",
        4,
        "--seq-len",
        64,
        "--dry-run",
        "--preset",
        "paper",
    )
    outcome = main(*asked)
    assert outcome.code == 0
    for words in ("layer 2 mlp", "layer 0 attention", "FLOPs", "about", "above the model's", "hidden states"):
        assert words in outcome.out
    outcome = main(*asked, "--batch-size", "auto", "--schedule", "single-sweep", "--json")
    document = json.loads(outcome.out)
    assert document["samples"]["batch_size"] == document["estimate"]["batch_size"] == 4
    assert [sweep["layers"] for sweep in document["estimate"]["sweeps"]] == [3]
    assert document["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_a_dry_run_says_which_layers_are_a_guess(main: RunMain, model: Path, tmp_path: Path) -> None:
    outcome = main("compress", model, "-o", tmp_path / "out", "--num-layers", 1, "--seq-len", 64, "--dry-run")
    assert re.search(r"layers +1, assumed: block influence decides", outcome.out)
    assert "for other layers" in outcome.out
    outcome = main("compress", model, "-o", tmp_path / "out", "--seq-len", 64, "--dry-run")
    assert re.search(r"layers +0-2\s", outcome.out)
    assert "assumed" not in outcome.out


def test_a_dry_run_under_a_budget_says_how_the_work_is_divided(main: RunMain, model: Path, tmp_path: Path) -> None:
    asked = ("compress", model, "-o", tmp_path / "out", "--num-samples", 4, "--seq-len", 64, "--dry-run")
    generous, least = (json.loads(main(*asked, *more, "--json").out) for more in ([], ["--memory", "1GB"]))
    assert [document["estimate"]["sweeps"][0]["spans"] for document in (generous, least)] == [1, 1]
    budget = least["estimate"]["least_memory"]
    tight = main(*asked, "--memory", budget)
    assert re.search(r"sweeps +2 over the calibration set, each in 3 spans of layers", tight.out)
    assert "disk" in tight.out
    assert json.loads(main(*asked, "--memory", budget, "--json").out)["memory"] == budget


def test_a_card_gives_the_time_and_has_cpu_memory_beside_it(main: RunMain, model: Path, tmp_path: Path) -> None:
    asked = ("compress", model, "-o", tmp_path / "out", "--num-samples", 4, "--seq-len", 64, "--dry-run")
    outcome = main(*asked, "--costs", "H100", "--host-memory", "1KB")
    assert re.search(r"on\s+H100.*peak rate of H100.*CPU memory +1\.0 KB", outcome.out, re.DOTALL)
    assert "are free" not in outcome.out
    fast, slow = (json.loads(main(*asked, "--costs", card, "--json").out)["seconds"] for card in ("B200", "A100"))
    assert fast < slow


def test_processes_are_those_of_torchrun(
    main: RunMain, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("compress", model, "-o", tmp_path / "out", "--num-samples", 4, "--seq-len", 64, "--dry-run", "--shard")
    assert "this is for one process" in main(*asked).out
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert "in each of 4 processes, sharded" in main(*asked).out
    document = json.loads(main(*asked, "--json").out)
    assert document["memory"] < document["free_bytes"] / 4
    assert "several processes would measure different costs" in main(*asked, "--target-latency", 0.8).err
    monkeypatch.setenv("RANK", "1")
    assert main(*asked).out == ""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "two")
    assert "WORLD_SIZE is 'two'; expected the number of processes" in main(*asked).err
