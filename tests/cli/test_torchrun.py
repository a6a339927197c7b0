from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from grasp import cli
from tests.command_line import Outcome, RunMain, grasp


@pytest.mark.slow
def test_processes_that_torchrun_starts_write_one_checkpoint_the_same_as_one_process(
    model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    """Three sequences, which two processes cannot share evenly."""

    def together(*arguments: object) -> Outcome:
        done = grasp(*arguments, cwd=tmp_path, processes=2, fresh=True)
        return Outcome(done.returncode, done.stdout, done.stderr)

    sizes = ["--num-samples", 3, "--seq-len", 24, "--num-layers", 2, "--retain-ratio", 0.4, "--dtype", "float32"]
    command = ["compress", model, "--calibration", text, *sizes, "--preset", "paper", "--json"]
    runs = {"alone": (main, []), "sharded": (together, ["--shard"])}
    weights, documents = {}, {}
    for name, (run, options) in runs.items():
        code, out, err = run(*command, "-o", tmp_path / name, *options)
        assert code == 0, err
        documents[name] = json.loads(out)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        assert err.count("block influence") == 1  # one process speaks
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in runs]
    assert files[0] == files[1]
    assert {path.name for path in tmp_path.iterdir()} == {"text.txt", *runs}
    for alone, module in zip(*(documents[run]["report"]["modules"] for run in runs), strict=True):
        assert module["indices"] == alone["indices"]
    assert weights["sharded"].keys() == weights["alone"].keys()
    for key, value in weights["sharded"].items():
        torch.testing.assert_close(value, weights["alone"][key], rtol=1e-5, atol=1e-6)


def test_sharding_without_torchrun_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["compress", "any", "-o", str(tmp_path / "small"), "--shard"])
    assert isinstance(result.exception, ValueError)
    assert "torchrun --nproc-per-node N -m grasp compress" in str(result.exception)
