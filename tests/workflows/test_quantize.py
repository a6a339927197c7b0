from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from grasp import cli
from grasp.calibration import builtin_kinds
from grasp.checkpoint.card import model_card, read_card
from grasp.checkpoint.compression_report import CompressionReport, kinds_text
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.saving import save_checkpoint
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import NonFiniteError, UnsupportedModelError
from grasp.method.storage import FP8, Storage, choose_storage
from grasp.model.layer_removal import remove_layers_
from grasp.model.quantized_linear import QUANTIZED
from grasp.statistics.hidden_states import Scratch
from grasp.workflows.convert import convert
from grasp.workflows.evaluate import evaluate
from grasp.workflows.quantize import quantize
from grasp.workflows.samples import Samples
from tests.checkpoint_edits import edit_json, edit_tensors
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A compressed Llama, whose layer 0 is dense, with a report, a licence, and a card that has text of its own."""
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.5))
    return save_checkpoint(
        *(model, tmp_path_factory.mktemp("place") / "small"),
        tokenizer=byte_tokenizer(),
        card=model_card(model, base_model="owner/model", details="## Mine\n\nText."),
        extra_files={"report.json": report.to_json(), "LICENSE": "Mine."},
    )


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Samples:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 40)
    return Samples(str(text), num_samples=4, seq_len=32, batch_size=2)


def logits(folder: Path) -> Tensor:
    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder)(tiny_batches(1)[0]).logits


def run(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_a_compressed_folder_becomes_a_smaller_one_with_the_same_texts(
    small: Path, samples: Samples, tmp_path: Path
) -> None:
    result = quantize(str(small), tmp_path / "out", Storage(8), samples)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {path.name for path in small.iterdir()}
    apart = (logits(tmp_path / "out") - logits(small)).norm() / logits(small).norm()
    assert 0 < apart < 0.05

    before, after = inspect_checkpoint(small), inspect_checkpoint(tmp_path / "out")
    assert (after.parameters, after.compression_ratio) == (before.parameters, before.compression_ratio)
    assert (result.before.bytes, result.after.bytes) == (before.bytes, after.bytes)
    assert result.to_dict()["share"] == after.bytes / before.bytes < 0.4
    report = CompressionReport.load(tmp_path / "out")
    assert report.after.bytes == after.bytes
    assert {(m.name, m.parameters, m.bytes) for m in after.modules} == {
        (m.name, m.parameters_after, m.bytes_after) for m in report.compressed
    }
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Mine\n\nText." in card
    assert f"{len(after.quantized)} int8." in card
    assert "rounded such that these change least, on 4 sequences of 32 tokens of a text file" in card
    losses = result.to_dict()["kind_losses"]
    assert losses.keys() == builtin_kinds("evaluation").keys()
    assert all(0 < abs(after - before) < 0.01 for before, after in losses.values())
    assert f"in no calibration text of grasp it adds {kinds_text(result.kinds)}." in card
    assert (tmp_path / "out" / "LICENSE").read_text() == "Mine."
    assert "nats per token in the mean of 6" in run(
        "quantize", small, "--rounding", "nearest", "-o", tmp_path / "again"
    )


def test_weights_that_no_kernel_here_reads_are_said(small: Path, samples: Samples, tmp_path: Path) -> None:
    notes: list[str] = []
    quantize(str(small), tmp_path / "fp8", FP8, samples, rounding="nearest", notify=notes.append)
    (note,) = notes
    assert note.startswith("on this machine each call dequantises fp8 weights, because no kernel reads them (")
    assert "cpu: " in note
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fp8")
    assert {str(module.storage) for module in loaded.modules() if isinstance(module, QUANTIZED)} == {"fp8", "int8"}


def test_hidden_states_beyond_half_of_the_free_memory_go_to_files(
    small: Path, samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, written = Scratch.write, []

    def counted(scratch: Scratch, file: IO[bytes], tensor: Tensor) -> None:
        written.append(tensor.nbytes)
        write(scratch, file, tensor)

    monkeypatch.setattr(Scratch, "write", counted)
    quantize(str(small), tmp_path / "memory", Storage(4), samples)
    assert not written
    monkeypatch.setattr("grasp.workflows.quantize.free_bytes", lambda device: 40_000)
    quantize(str(small), tmp_path / "files", Storage(4), samples)
    assert written
    expected, got = (load_file(tmp_path / name / "model.safetensors") for name in ("memory", "files"))
    assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())


def test_a_folder_without_some_layers_keeps_its_texts_and_sizes(
    samples: Samples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.5))
    report = replace(report, removed_layers=(1,), modules=tuple(m for m in report.modules if m.layer != 1))
    dense = tiny_model("llama", vocab_size=len(byte_tokenizer()))
    remove_layers_(dense, [1])
    folder = save_checkpoint(
        *(dense, tmp_path / "short"),
        tokenizer=byte_tokenizer(),
        card=model_card(dense, base_model="owner/model", details="## Mine\n\nText."),
        extra_files={"report.json": replace(report, modules=()).to_json()},
    )
    monkeypatch.chdir(tmp_path)
    Path("builtin").mkdir()  # is not what builtin means
    quantize(str(folder), tmp_path / "out", Storage(8), samples)
    found = inspect_checkpoint(tmp_path / "out")
    assert found.parameters_before == report.before.parameters
    card = (tmp_path / "out" / "README.md").read_text()
    assert "## Mine\n\nText." in card
    assert f"({report.before.parameters:,} before, {dense.num_parameters():,} now)" in card


def test_a_dense_folder_needs_no_text_with_rounding_to_nearest(tmp_path: Path) -> None:
    tiny_model("qwen2", torch.bfloat16, vocab_size=len(byte_tokenizer())).save_pretrained(tmp_path / "dense")
    byte_tokenizer().save_pretrained(tmp_path / "dense")
    arguments = ("quantize", tmp_path / "dense", "--bits", 4, "--group", 32, "--rounding", "nearest")
    text = run(*arguments, "--calibration", "missing.txt", "-o", tmp_path / "out")
    assert "int4/32, nearest" in text
    assert "embeddings, int4/32" in text
    found = inspect_checkpoint(tmp_path / "out")
    assert (found.modules, set(found.quantized.values())) == ((), {"int4/32", "int8"})
    assert read_card((tmp_path / "out" / "README.md").read_text()).data.tags == ["grasp", "quantized"]

    values = json.loads(run(*arguments, "--json", "-o", tmp_path / "again"))
    assert (values["bits"], values["group"], values["samples"]) == (4, 32, None)
    assert values["share"] == values["after"]["bytes"] / values["before"]["bytes"] < 0.6
    assert "int8" in run("inspect", tmp_path / "out")
    assert evaluate(str(tmp_path / "out"), None, device="cpu").size.bytes == found.bytes


def test_a_quantised_source_is_refused_and_nothing_is_written(small: Path, samples: Samples, tmp_path: Path) -> None:
    quantize(str(small), tmp_path / "int8", Storage(8), samples, rounding="nearest")
    other = tmp_path / "other"
    tiny_model("llama").save_pretrained(other)
    gptq = {"quant_method": "gptq", "bits": 4}
    edit_json(other / "config.json", lambda config: config.update(quantization_config=gptq))
    for source, message in ((tmp_path / "int8", r"is quantised \(int8\)"), (other, r"is quantised \(.*gptq.*\)")):
        with pytest.raises(UnsupportedModelError, match=message):
            quantize(str(source), tmp_path / "out", Storage(8), samples)
    with pytest.raises(UnsupportedModelError, match="are quantised; expected floating ones"):
        convert(tmp_path / "int8", tmp_path / "out", "factored")
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused_by_name(small: Path, samples: Samples, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(small)
    save_checkpoint(model, tmp_path / "damaged", tokenizer=byte_tokenizer())
    edit_tensors(tmp_path / "damaged", lambda tensors: tensors[f"{UP}.U"][0, 0].fill_(torch.nan))
    with pytest.raises(NonFiniteError, match=rf"{UP} cannot be quantised: its weights have NaN"):
        quantize(str(tmp_path / "damaged"), tmp_path / "out", Storage(8), samples, rounding="nearest")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("bits", "group", "message"),
    [
        (3, None, "bits must be 8, 4 or fp8, got 3"),
        (8, 64, "group is an option of 4 bits, got 64 with 8"),
        (4, 48, "group must be 32, 64 or 128, got 48"),
    ],
)
def test_storages_that_no_kernel_serves_are_refused(bits: int, group: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        choose_storage(bits, group)
    assert choose_storage(8) == Storage(8)
    assert str(choose_storage("fp8")) == "fp8"
    assert choose_storage(4) == Storage(4, 64)
