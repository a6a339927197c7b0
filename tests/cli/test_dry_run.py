from __future__ import annotations

import json
import re
from pathlib import Path

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
