from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.study import release
from grasp.checkpoint.push import require_complete
from tests.command_line import run_script, save_tiny_model


def test_a_family_is_staged_and_a_second_run_does_nothing_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny_model(tmp_path / "Tiny")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 100)
    sizes = ["--num-samples", "8", "--seq-len", "32", "--window", "32"]
    texts = ["--calibration", text, "--text", text]
    arguments = [model, "-o", tmp_path / "family", "--ratios", "0.1,0.2", *sizes, *texts]
    result = run_script(release.main, *arguments)
    assert result.exit_code == 0, result.output
    folders = [tmp_path / "family" / f"Tiny-grasp-{percent}pct" for percent in (10, 20)]
    for folder in folders:
        assert require_complete(folder).compression_ratio > 0.05
        assert f"grasp push {folder} OWNER/{folder.name}" in result.output
        before, after = (json.loads((folder / name).read_text()) for name in release.RESULTS)
        card = (folder / "README.md").read_text()
        assert all(f"{measured['result']['perplexity']:,.3f}" in card for measured in (before, after)), card

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing is left to do")

    monkeypatch.setattr(release, "compress", refuse)
    monkeypatch.setattr(release, "evaluate", refuse)
    assert run_script(release.main, *arguments).exit_code == 0


def test_a_bad_ratio_is_an_error_before_anything_is_written(tmp_path: Path) -> None:
    result = run_script(release.main, "builtin", "-o", tmp_path / "family", "--ratios", "0.1,2")
    assert result.exit_code == 2
    assert "compression_ratio must be in" in result.output
    assert not (tmp_path / "family").exists()
