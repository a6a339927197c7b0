from __future__ import annotations

import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from typer.testing import CliRunner

from grasp import cli, files
from grasp.checkpoint.saving import save_checkpoint
from grasp.compression.quantize import quantize_
from grasp.errors import CheckpointError, MissingPackageError, UnsupportedModelError
from grasp.loading import DTYPES
from grasp.method.storage import STORAGES
from grasp.model.layer_removal import remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from grasp.workflows import export as module
from grasp.workflows.export import export
from tests.command_line import grasp
from tests.documents import blocks, commands, read, run_python
from tests.lowrank_models import lowrank_model
from tests.quantized_models import quantized_model
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import trained_tokenizer

TOKENIZER = trained_tokenizer("The capital of France is Paris. " * 2)
CACHE = "from transformers import dynamic_module_utils\ndynamic_module_utils.HF_MODULES_CACHE = 'modules'\n"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers, of which one is low-rank, partly pivoted; a third one was removed."""
    model = tiny_model("llama", vocab_size=len(TOKENIZER))
    for rank, target in enumerate(layer_targets(model, 1)[0], start=5):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    assert model.get_submodule("model.layers.1.mlp.up_proj").pivot_() is None
    remove_layers_(model, [0])
    return saved(model, tmp_path_factory.mktemp("place") / "small")


def saved(model: PreTrainedModel, folder: Path) -> Path:
    return save_checkpoint(model, folder, tokenizer=TOKENIZER, extra_files={"LICENSE": "Mine."})


def convert(*arguments: object) -> str:
    result = CliRunner().invoke(cli.app, ["convert", *map(str, arguments)], env={"COLUMNS": "500"})
    assert result.exit_code == 0, result.exception
    return result.stdout


@torch.no_grad()
def logits(folder: Path, file: str | None = None) -> Tensor:
    return AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)(tiny_batches(1)[0]).logits


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_a_gguf_file_has_fewer_blocks_and_dense_weights_and_the_command_says_so(small: Path, tmp_path: Path) -> None:
    shown = convert(small, "-o", tmp_path / "out", "--to", "gguf")
    assert "7 low-rank linears are dense in this file: llama.cpp has no low-rank tensor" in shown
    assert re.search(r"bytes +[\d.]+ KB -> [\d.]+ KB", shown)
    assert (names(tmp_path), names(tmp_path / "out")) == ({"out"}, {"model.gguf", "LICENSE"})
    torch.testing.assert_close(logits(tmp_path / "out", "model.gguf"), logits(small), rtol=1e-5, atol=1e-5)


def test_quantised_weights_are_dequantised_into_a_gguf_file(tmp_path: Path) -> None:
    source = saved(quantized_model(dtype=torch.bfloat16, vocab_size=len(TOKENIZER)), tmp_path / "int8")
    result = export(source, tmp_path / "out", "gguf")
    assert result.after > result.before
    dense = AutoModelForCausalLM.from_pretrained(source).dequantize()
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "out", gguf_file="model.gguf")
    for name, weight in dense.named_parameters():
        torch.testing.assert_close(read.get_parameter(name), weight.to(read.dtype), rtol=0, atol=0)


def test_pairs_of_linears_are_written_with_their_code(small: Path, tmp_path: Path) -> None:
    outcome = json.loads(convert(small, "-o", tmp_path / "out", "--to", "linear-pairs", "--json"))
    assert outcome["note"].startswith("7 low-rank linears are pairs of nn.Linear.")
    assert outcome["after"] > outcome["before"]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["linear_pairs"]["model.layers.0.self_attn.q_proj"] == [32, 5, 32]
    assert "quantization_config" not in config
    assert names(tmp_path / "out") >= {"modeling_linear_pairs.py", "tokenizer.json", "LICENSE"}


def test_what_cannot_be_exported_is_refused_and_nothing_is_written(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: name)  # as if all packages were installed
    gpt2 = saved(tiny_model("gpt2", vocab_size=len(TOKENIZER)), tmp_path / "gpt2")
    int8 = saved(quantized_model(vocab_size=len(TOKENIZER)), tmp_path / "int8")
    before = names(tmp_path)
    for source, output, to, error, message in (
        (gpt2, "out", "gguf", UnsupportedModelError, r"got GPT2LMHeadModel.*convert_hf_to_gguf\.py"),
        (int8, "out", "linear-pairs", UnsupportedModelError, "Give the model that it was made from"),
        (int8, "out", "onnx", UnsupportedModelError, "Give the model that it was made from"),
        (tmp_path / "none", "out", "gguf", CheckpointError, "none"),
        (small, "gpt2", "gguf", CheckpointError, "is not empty"),
    ):
        with pytest.raises(error, match=message):
            export(source, tmp_path / output, to)
    assert names(tmp_path) == before


@pytest.mark.parametrize(
    ("to", "weights"),
    [
        *(("gguf", weights) for weights in (*DTYPES, "int8")),
        *(("linear-pairs", weights) for weights in DTYPES),
        pytest.param("onnx", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_an_export_asks_the_disk_for_what_it_writes(
    to: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if to == "onnx":
        pytest.importorskip("onnxscript")
    sizes = {"vocab_size": len(TOKENIZER), "hidden_size": 256, "intermediate_size": 512}
    model = lowrank_model(dtype=DTYPES.get(weights, torch.bfloat16), pivoted=(1,), **sizes)
    if weights == "int8":
        quantize_(model, STORAGES[weights])
    source = saved(model, tmp_path / "small")
    needed: list[float] = []

    class Free(float):
        def __lt__(self, other: float) -> bool:
            needed.append(other)
            return False

    monkeypatch.setattr(files, "_SPARE_BYTES", 0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=Free()))
    written = export(source, tmp_path / "first", to).after
    assert 0.8 * written < max(needed) <= written
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=0.8 * written))
    with pytest.raises(CheckpointError, match="GB are free"):
        export(source, tmp_path / "out", to)
    assert names(tmp_path) == {"small", "first"}


def test_a_missing_package_and_an_unknown_target_are_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"--to gguf needs gguf; .*'grasp-llm\[gguf\]'"):
        export(small, tmp_path / "out", "gguf")
    result = CliRunner().invoke(cli.app, ["convert", str(small), "-o", str(tmp_path / "out"), "--to", "tflite"])
    assert "--to must be one of factored, pivoted, linear-pairs, onnx, gguf; got 'tflite'" in str(result.exception)
    assert not names(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "package"), [("llama-cpp", "llama_cpp"), ("linear-pairs", "torch"), ("linear-pairs", "llmcompressor")]
)
def test_the_commands_and_python_of_a_page_run(page: str, package: str, small: Path, tmp_path: Path) -> None:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    text = read(f"docs/serve/{page}.md")
    (tmp_path / "small").symlink_to(small)
    (line,) = [line for line in commands(text) if line.startswith("grasp")]
    run = grasp(*shlex.split(line)[1:], cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    (code,) = [code for code in blocks(text, "python") if code.split()[1] == package]
    assert run_python(CACHE + code, tmp_path).strip()


def test_every_block_of_a_page_is_run() -> None:
    shown = [
        code.split()[1]
        for page in ("llama-cpp", "linear-pairs")
        for code in blocks(read(f"docs/serve/{page}.md"), "python")
    ]
    assert shown == ["llama_cpp", "torch", "llmcompressor"]
