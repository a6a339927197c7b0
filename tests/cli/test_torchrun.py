from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from typer.testing import CliRunner

from grasp import cli
from tests.command_line import grasp, save_tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 20


def compress(model: Path, folder: Path, *options: object, processes: int = 1) -> tuple[int, str, str]:
    """Three sequences, which two processes cannot share evenly; exit code, stdout, stderr."""
    text = folder / "text.txt"
    text.write_text(TEXT)
    done = grasp(
        *("compress", model, "--calibration", text, "--num-samples", 3, "--seq-len", 24, "--num-layers", 2),
        *("--retain-ratio", 0.4, "--dtype", "float32", "--preset", "paper", *options),
        cwd=folder,
        processes=processes,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.slow
def test_processes_that_torchrun_starts_write_one_checkpoint_the_same_as_one_process(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    runs = {"alone": (1, []), "shared": (2, []), "sharded": (2, ["--shard"])}
    weights, documents = {}, {}
    for name, (processes, options) in runs.items():
        code, out, err = compress(model, tmp_path, "-o", tmp_path / name, "--json", *options, processes=processes)
        assert code == 0, err
        documents[name] = json.loads(out)
        weights[name] = load_file(tmp_path / name / "model.safetensors")
        assert err.count("block influence") == 1  # one process speaks
    files = [{path.name for path in (tmp_path / name).iterdir()} for name in runs]
    assert files[0] == files[1] == files[2]
    assert {path.name for path in tmp_path.iterdir()} == {"model", "text.txt", *runs}
    for name in ("shared", "sharded"):
        for alone, module in zip(*(documents[run]["report"]["modules"] for run in ("alone", name)), strict=True):
            assert module["indices"] == alone["indices"]
        assert weights[name].keys() == weights["alone"].keys()
        for key, value in weights[name].items():
            torch.testing.assert_close(value, weights["alone"][key], rtol=1e-5, atol=1e-6)


def test_sharding_without_torchrun_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli.app, ["compress", "any", "-o", str(tmp_path / "small"), "--shard"])
    assert isinstance(result.exception, ValueError)
    assert "torchrun --nproc-per-node N -m grasp compress" in str(result.exception)
