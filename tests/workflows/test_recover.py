from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from grasp import cli
from grasp.calibration import builtin_kinds
from grasp.checkpoint import run_folder
from grasp.checkpoint.compression_report import kinds_text
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.recovery_report import RecoveryReport
from grasp.config import GraspConfig
from grasp.errors import CheckpointError, ResumeError, TrainingDataError, UnsupportedModelError
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import LowRankLinear
from grasp.recovery import RecoveryConfig
from grasp.workflows import recover as recovery_job
from grasp.workflows.compress import compress
from grasp.workflows.convert import convert
from grasp.workflows.quantize import quantize
from grasp.workflows.samples import Samples
from tests import command_line
from tests.interrupted import Killed, stop_at

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 40
OPTIONS = ("--seq-len", 32, "--batch-size", 8, "--learning-rate", 0.01, "--tokens", 8000)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dense model, a compressed one, and data."""
    place = tmp_path_factory.mktemp("place")
    command_line.save_tiny_model(place / "model")
    (place / "text.txt").write_text(TEXT)
    lines = [{"instruction": f"Say {word}.", "input": "", "output": word} for word in ("one", "two", "three")]
    (place / "some.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = GraspConfig(layers=(1, 2), retain_ratio=0.4, schedule="single-sweep")
    compress(str(place / "model"), place / "small", config, Samples(str(place / "text.txt"), 4, 32))
    return place


def recover(place: Path, output: Path, *options: object, source: str = "small") -> Result:
    text = () if "--instructions" in options else ("--text", place / "text.txt")
    arguments = ("recover", place / source, "-o", output, *text, *OPTIONS, *options)
    return CliRunner().invoke(cli.app, [str(argument) for argument in arguments])


def test_a_recovered_checkpoint_is_the_compressed_one_with_other_factors(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "out", "--json")
    assert result.exit_code == 0, result.exception
    document = json.loads(result.stdout)["report"]
    assert document["loss_after"] < document["loss_before"] - 0.2
    names = {path.name for path in (place / "small").iterdir()}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names | {"recovery.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert json.loads((tmp_path / "out" / "recovery.json").read_text()) == document
    for name in names - {"model.safetensors", "README.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (place / "small" / name).read_bytes(), name

    before, after = (load_file(folder / "model.safetensors") for folder in (place / "small", tmp_path / "out"))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if name.endswith((".U", ".Vh"))}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, LowRankLinear) for module in loaded.modules()) == document["factors"] == 14

    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith((place / "small" / "README.md").read_text().rstrip())
    assert f"were trained on {document['tokens']:,} tokens of a text file" in card
    kinds = RecoveryReport.load(tmp_path / "out").kinds
    assert {row.kind for row in kinds} == builtin_kinds("evaluation").keys()
    assert all(row.added != 0 for row in kinds)
    assert f"in no training text of grasp it changed by {kinds_text(kinds)}." in card
    again = recovery_job.recover(
        tmp_path / "out",
        tmp_path / "twice",
        RecoveryConfig(tokens=256),
        recovery_job.TrainingData(str(place / "text.txt"), None, 32),
    )
    twice = (tmp_path / "twice" / "README.md").read_text()
    assert twice.count("## Recovery") == 1
    assert f"{again.report.tokens:,} tokens" in twice


def test_a_pivoted_checkpoint_stays_pivoted(place: Path, tmp_path: Path) -> None:
    convert(place / "small", tmp_path / "pivoted", "pivoted")
    data = recovery_job.TrainingData(str(place / "text.txt"), None, 32)
    result = recovery_job.recover(tmp_path / "pivoted", tmp_path / "out", RecoveryConfig(0.01, 2000, 8), data)
    assert result.report.loss_after < result.report.loss_before
    before, after = (inspect_checkpoint(tmp_path / name) for name in ("pivoted", "out"))
    assert after.modules == before.modules
    assert {module.form for module in after.modules} == {"pivoted"}
    tensors = [load_file(tmp_path / name / "model.safetensors") for name in ("pivoted", "out")]
    changed = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert changed == {name for name in tensors[0] if name.endswith((".U", ".Vh"))}
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_a_quantised_checkpoint_is_trained(place: Path, tmp_path: Path) -> None:
    quantize(str(place / "small"), place / "int4", Storage(4, 32), Samples(), rounding="nearest")
    result = recover(place, tmp_path / "out", source="int4")
    assert "scales and norms of a quantised model" in result.stdout
    card = (tmp_path / "out" / "README.md").read_text()
    assert "the scales of quantised weights and the norms" in card
    tensors = [load_file(folder / "model.safetensors") for folder in (place / "int4", tmp_path / "out")]
    changed = {name for name in tensors[0] if not torch.equal(tensors[0][name], tensors[1][name])}
    assert any(name.endswith("Vh_scales") for name in changed)
    assert all(name.endswith(("_scales", "norm.weight")) for name in changed)
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_the_result_is_shown(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "out", "--instructions", place / "some.jsonl", "--seq-len", 128, "--tokens", 500)
    assert result.exit_code == 0, result.exception
    for words in (
        "in 14 low-rank linears",
        "held-out loss",
        "nats per token, after step",
        "in the mean of 6",
    ):
        assert words in result.stdout
    assert "a file of instructions" in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.parametrize(
    ("source", "options", "kind", "words"),
    [
        ("model", {}, UnsupportedModelError, "has no low-rank linears to train"),
        ("nothing", {}, CheckpointError, "no folder .*nothing; expected a checkpoint"),
        ("small", {"instructions": Path("nothing")}, TrainingDataError, "there is no file nothing"),
        ("small", {"seq_len": 4000}, TrainingDataError, "the data have 1 sequences"),
    ],
)
def test_wrong_checkpoints_and_data_are_refused_and_nothing_is_written(
    place: Path, tmp_path: Path, source: str, options: dict, kind: type[Exception], words: str
) -> None:
    text = None if "instructions" in options else str(place / "text.txt")
    data = recovery_job.TrainingData(text, **options)
    with pytest.raises(kind, match=words):
        recovery_job.recover(place / source, tmp_path / "out", RecoveryConfig(), data)
    assert not list(tmp_path.iterdir())


def test_a_text_beside_instructions_is_refused(place: Path, tmp_path: Path) -> None:
    result = recover(place, tmp_path / "out", "--instructions", "some.jsonl", "--text", "text.txt")
    assert str(result.exception) == "give text or instructions, got text.txt and some.jsonl"


def test_a_card_that_cannot_be_read_is_refused_before_the_model_is_loaded(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    (tmp_path / "small" / "README.md").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"README\.md is not UTF-8"):
        recovery_job.recover(tmp_path / "small", tmp_path / "out", RecoveryConfig(), recovery_job.TrainingData())


def test_a_stopped_run_resumes_to_the_same_weights_and_refuses_other_settings(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def job(batch_size: int) -> None:
        data = recovery_job.TrainingData(str(place / "text.txt"), None, 32)
        config = RecoveryConfig(0.01, 8000, batch_size)
        recovery_job.recover(place / "small", tmp_path / "out", config, data, progress=stop_at("recovery", 3))

    monkeypatch.setattr(run_folder, "INTERVAL", 0.0)  # the progress is stored after every step
    monkeypatch.setattr(run_folder, "WRITE_FRACTION", float("inf"))
    with pytest.raises(Killed):
        job(8)
    assert not (tmp_path / "out").exists()

    with pytest.raises(ResumeError, match=r"batch_size is 4, expected 8"):
        job(4)
    continued = recover(place, tmp_path / "out", "--json")
    assert continued.exit_code == 0, continued.stderr
    assert "resuming after " in continued.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"out"}

    whole = recover(place, tmp_path / "whole", "--json")
    assert whole.exit_code == 0, whole.stderr
    curves = [json.loads(run.stdout)["report"]["curve"] for run in (continued, whole)]
    assert curves[0] == curves[1]
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_two_processes_write_one_checkpoint_like_that_of_one_process(place: Path, tmp_path: Path) -> None:
    losses = {}
    for processes in (1, 2):
        run = command_line.grasp(
            *("recover", "small", "-o", tmp_path / str(processes), "--text", "text.txt", *OPTIONS, "--json"),
            cwd=place,
            processes=processes,
        )
        assert run.returncode == 0, run.stderr
        assert run.stderr.count("step 0 of ") == 1  # one process speaks
        losses[processes] = json.loads(run.stdout)["report"]["loss_after"]
    assert losses[2] == pytest.approx(losses[1], abs=1e-3)
    assert {path.name for path in tmp_path.iterdir()} == {"1", "2"}
