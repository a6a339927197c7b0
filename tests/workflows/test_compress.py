from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp import builtin
from grasp.calibration import builtin_kinds
from grasp.checkpoint.compression_report import CompressionReport, kinds_text
from grasp.config import GraspConfig
from grasp.errors import CalibrationError, GraspError, OutOfMemoryError, UnsupportedModelError
from grasp.model.quantized_linear import QUANTIZED
from grasp.model.size import model_size
from grasp.progress import no_notify
from grasp.reporting.rerun_command import rerun_command
from grasp.workflows.compress import compress, worse_than_removal
from grasp.workflows.evaluate import evaluate
from grasp.workflows.kinds import batches_by_kind, losses_by_kind
from grasp.workflows.samples import Samples
from tests.command_line import save_tiny_model
from tests.tiny_models import tiny_model

pytestmark = pytest.mark.long


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "tiny")


@pytest.fixture
def samples(tmp_path: Path) -> Samples:
    text = tmp_path / "text.txt"
    text.write_text("All work and no play makes Jack a dull boy. " * 30)
    return Samples(str(text), num_samples=2, seq_len=32, batch_size=2, seed=3)


def no_memory(*_: Any, **__: Any) -> NoReturn:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_too_little_memory_is_an_error_with_a_remedy(
    model: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp.workflows.compress.compress_", no_memory)
    with pytest.raises(OutOfMemoryError, match="batches of 2 x 32 tokens"):
        compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples)
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr("grasp.workflows.evaluate.perplexity", no_memory)
    with pytest.raises(OutOfMemoryError, match="batches of 1 x 64 tokens"):
        evaluate(str(model), samples.source, window=64)


@pytest.mark.parametrize(
    ("error", "expected", "message"),
    [
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), OutOfMemoryError, "too little"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory"), OutOfMemoryError, "too little"),
        (MemoryError(), OutOfMemoryError, "too little memory"),
        (
            torch.linalg.LinAlgError("linalg.svd: failed\nto converge"),
            GraspError,
            r"\(linalg\.svd: failed to converge\)",
        ),
        (RuntimeError("a defect"), RuntimeError, "a defect"),
    ],
)
@pytest.mark.parametrize("step", ["load_quietly", "compress_"])
def test_errors_of_memory_and_decompositions_are_said_in_one_line_and_others_are_not_hidden(
    step: str,
    error: Exception,
    expected: type[Exception],
    message: str,
    model: Path,
    samples: Samples,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> NoReturn:
        raise error

    monkeypatch.setattr(f"grasp.workflows.compress.{step}", fail)
    with pytest.raises(expected, match=message) as caught:
        compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples)
    assert "\n" not in str(caught.value)


def test_a_model_quantised_by_others_is_refused_before_it_is_loaded(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UnsupportedModelError, match=r"the model is quantised \(gptq\); expected a dense one"):
        compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_a_target_above_the_size_of_the_model_leaves_it_dense(model: Path, samples: Samples, tmp_path: Path) -> None:
    done = compress(str(model), tmp_path / "out", GraspConfig.best(target_bytes=10**15), samples)
    assert done.report.after == done.report.before


def test_a_tokenizer_of_another_model_is_refused(model: Path, samples: Samples, tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(model)
    message = "the tokenizer gives the token .* but the model has 97 tokens"
    with pytest.raises(CalibrationError, match=message):
        compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples)
    with pytest.raises(CalibrationError, match=message):
        evaluate(str(model), samples.source)


def test_the_model_card_says_how_it_was_made_but_not_from_which_file(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    done = compress(str(model), tmp_path / "out", GraspConfig(layers=(1,), retain_ratio=0.4), samples)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "layers: 1 (as requested). Calibrated on 2 sequences of 32 tokens of a text file (seed 3)." in card
    assert str(tmp_path) not in card
    assert done.report.calibration["sequences"] == 2


@pytest.mark.parametrize(("basis", "expected"), [("whitened", 2 + 2), ("plain", 2)])
def test_covariances_see_more_first_tokens(
    model: Path, samples: Samples, tmp_path: Path, basis: str, expected: int
) -> None:
    config = GraspConfig(layers=(1,), retain_ratio=0.4, basis=basis)
    calibration = compress(str(model), tmp_path / "out", config, samples).report.calibration
    assert calibration["sequences"] == expected
    assert calibration["tokens"] == 2 * 32 + 2 * (expected - 2)


def test_texts_with_the_terms_of_a_model_are_copied(model: Path, samples: Samples, tmp_path: Path) -> None:
    (model / "LICENSE.txt").write_text("Mine.")
    compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples)
    assert (tmp_path / "out" / "LICENSE.txt").read_text() == "Mine."


def test_a_quantised_result_reloads_and_its_card_says_how_it_is_stored(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    config = GraspConfig.best(compression_ratio=0.05, bits=8, bits_dense=4)
    report = compress(str(model), tmp_path / "out", config, samples).report
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model_size(loaded) == report.after
    assert {str(module.storage) for module in loaded.modules() if isinstance(module, QUANTIZED)} == {"int8", "int4/64"}
    card = (tmp_path / "out" / "README.md").read_text()
    assert "stored as int8 if they are low-rank and as int4/64 if they are dense, fitted to" in card
    assert {"--bits", "8", "--bits-dense", "4"} <= {*(rerun_command(report, "out") or [])}


def test_an_fp8_result_reloads_and_that_no_kernel_reads_it_is_said(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    notes: list[str] = []
    config = GraspConfig.best(compression_ratio=0.05, bits="fp8")
    report = compress(str(model), tmp_path / "out", config, samples, notify=notes.append).report
    assert sum("each call dequantises fp8 weights, because no kernel" in note for note in notes) == 1
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model_size(loaded) == report.after
    assert {str(module.storage) for module in loaded.modules() if isinstance(module, QUANTIZED)} == {"fp8", "int8"}


def test_few_tokens_for_the_widest_linear_are_said(model: Path, samples: Samples, tmp_path: Path) -> None:
    def notes(count: int) -> list[str]:
        said: list[str] = []
        few = replace(samples, num_samples=count)
        compress(str(model), tmp_path / str(count), GraspConfig.best(compression_ratio=0.05), few, notify=said.append)
        return [note for note in said if "tokens are few" in note]

    (note,) = notes(2)
    assert note.startswith(
        "64 calibration tokens are few for linears with 48 inputs: 192 or more, such as --num-samples 6"
    )
    assert not notes(6)


def test_a_published_result_that_removing_layers_would_beat_is_said(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    said: list[str] = []
    config = GraspConfig.paper(compression_ratio=0.2)
    report = compress(str(model), tmp_path / "out", config, samples, notify=said.append).report
    (name,) = report.held_out_loss.keys() - {"dense", "compressed"}
    notices = [worse_than_removal(report)]
    assert any("removing layers would lose less" in note for note in said) == (notices[0] is not None)
    for loss in (0.0, 99.0):
        notices.append(worse_than_removal(replace(report, held_out_loss={**report.held_out_loss, name: loss})))
    assert notices[1] is not None
    assert name in notices[1]
    assert notices[2] is None
    larger = replace(report, held_out_loss={**report.held_out_loss, name: 0.0}, candidate_bytes={name: 10**9})
    assert worse_than_removal(larger) is None


def test_the_card_lists_every_candidate(model: Path, samples: Samples, tmp_path: Path) -> None:
    report = compress(str(model), tmp_path / "out", GraspConfig.best(compression_ratio=0.05), samples).report
    card = (tmp_path / "out" / "README.md").read_text()
    assert len(report.candidates) >= 4
    assert all(f"\n| {row.name} | {row.loss:.4f} | " in card for row in report.candidates)


def test_losses_on_every_kind_of_text_are_in_the_report_and_the_card(
    model: Path, samples: Samples, tmp_path: Path
) -> None:
    config = GraspConfig.paper(num_layers=1, retain_ratio=0.1)
    report = compress(str(model), tmp_path / "out", config, samples).report
    assert [row.kind for row in report.kinds] == sorted(
        builtin_kinds("evaluation"), key=lambda kind: report.kind_losses[kind][0] - report.kind_losses[kind][1]
    )
    worst = report.kinds[0]
    assert f"{worst.added:+.3f} on {worst.kind}" in kinds_text(report.kinds)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"in no calibration text of grasp: {kinds_text(report.kinds)}.\n\n| kind of text" in card
    assert f"| {worst.kind} | {worst.dense:.3f} | {worst.compressed:.3f} | {worst.added:+.3f} |" in card
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    losses = losses_by_kind(reloaded, batches_by_kind(reloaded, tokenizer, samples.seq_len, no_notify))
    assert losses == {kind: pytest.approx(after, abs=1e-5) for kind, (_, after) in report.kind_losses.items()}


def test_without_the_texts_of_other_kinds_a_line_says_so(
    model: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(builtin, "find_spec", lambda _: None)
    lines: list[str] = []
    result = compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples, notify=lines.append)
    assert not result.report.kinds
    assert any("other kinds of text are not measured" in line and "pip install" in line for line in lines)


def test_the_seed_chooses_the_sequences(model: Path, samples: Samples, tmp_path: Path) -> None:
    digests = []
    for number, seed in enumerate((3, 3, 4)):
        again = Samples(samples.source, num_samples=2, seq_len=32, seed=seed)
        done = compress(str(model), tmp_path / f"out{number}", GraspConfig(layers=(), retain_ratio=0.4), again)
        digests.append(done.report.calibration["sha256"])
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(("basis", "announced"), [("kfac", True), ("plain", False)])
def test_a_device_without_fp64_is_announced_before_weights_are_decomposed_elsewhere(
    basis: str, announced: bool, model: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("grasp.compression.device_speed.fp64_device", lambda device: torch.device("cpu:0"))
    lines: list[str] = []
    compress(str(model), tmp_path / "out", GraspConfig(num_layers=1, basis=basis), samples, notify=lines.append)
    assert any("has no fp64" in line for line in lines) == announced


def test_a_kind_of_text_whose_loss_is_not_finite_is_left_out_and_reported(
    model: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    monkeypatch.setattr(
        "grasp.workflows.compress.losses_by_kind",
        lambda model, kinds, **_: {kind: math.nan if kind == "stories" else 1.0 for kind in kinds},
    )
    compress(str(model), tmp_path / "out", GraspConfig(num_layers=1), samples, notify=lines.append)
    assert any("the loss on stories is NaN or infinite" in line for line in lines)
    assert "stories" not in CompressionReport.load(tmp_path / "out").kind_losses
