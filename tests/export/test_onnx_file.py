from __future__ import annotations

import ast
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig, BloomForCausalLM

from grasp.checkpoint.saving import save_checkpoint
from grasp.errors import UnsupportedModelError
from grasp.export.onnx_file import export_onnx
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from tests.command_line import grasp, grasp_below
from tests.documents import blocks, commands, read, run_python
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

PAGE = read("docs/serve/onnx.md")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``small``, a Mistral of one low-rank layer whose window has 8 tokens, after the page's command."""
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    folder = tmp_path_factory.mktemp("onnx")
    model = tiny_model("mistral", vocab_size=4096, num_hidden_layers=1)  # the weights are larger than the graph
    for rank, target in enumerate(layer_targets(model, 0)[0], start=5):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    assert model.get_submodule("model.layers.0.mlp.up_proj").pivot_() is None
    save_checkpoint(model, folder / "small", tokenizer=byte_tokenizer())
    (line,) = [line for line in commands(PAGE) if line.startswith("grasp")]
    run = grasp(*shlex.split(line)[1:], cwd=folder)
    assert run.returncode == 0, run.stderr
    assert "7 low-rank linears are two MatMuls each" in run.stdout
    return folder


@pytest.mark.slow
def test_a_graph_whose_weights_are_cut_short_is_not_left(exported: Path) -> None:
    limit = (exported / "small-onnx/model.onnx.data").stat().st_size - 1
    run = grasp_below(limit, "convert", "small", "-o", "cut", "--to", "onnx", cwd=exported)
    assert run.returncode == 2
    assert f"model.onnx.data has {limit} of {limit + 1} bytes" in run.stderr
    assert not [path for path in exported.iterdir() if "cut" in path.name]


@pytest.mark.slow
def test_the_python_of_the_page_decodes_the_tokens_of_transformers(exported: Path) -> None:
    (code,) = blocks(PAGE, "python")
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(exported / "small"),
        AutoTokenizer.from_pretrained(exported / "small"),
    )
    tokens = tokenizer("The capital of France is", return_tensors="pt").input_ids
    expected = model.generate(tokens, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert ast.literal_eval(run_python(code, exported).splitlines()[-1]) == expected[0].tolist()


@pytest.mark.slow
def test_a_padded_batch_has_the_logits_of_transformers_at_once_and_token_by_token(exported: Path) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(exported / "small-onnx/model.onnx", providers=["CPUExecutionProvider"])
    tokens = torch.randint(3, 200, (3, 11), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    model = AutoModelForCausalLM.from_pretrained(exported / "small")
    with torch.no_grad():
        expected = model(tokens, attention_mask=mask, position_ids=positions).logits
    for ends in ((11,), (6, 7, 8, 9, 10, 11)):
        empty = np.zeros((3, 2, 0, 8), np.float32)
        past, rows, start = {"past_key_values.0.key": empty, "past_key_values.0.value": empty}, [], 0
        for end in ends:
            given = {"input_ids": tokens[:, start:end], "position_ids": positions[:, start:end]}
            given["attention_mask"] = mask[:, :end]
            logits, *present = session.run(None, {**{name: value.numpy() for name, value in given.items()}, **past})
            past, start = dict(zip(past, present, strict=True)), end
            rows.append(torch.from_numpy(logits))
        real = mask.bool()
        torch.testing.assert_close(torch.cat(rows, 1)[real], expected[real], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_low_rank_linear_is_two_products_with_its_factors(exported: Path) -> None:
    import onnx

    graph = onnx.load(exported / "small-onnx/model.onnx").graph
    weights = {tensor.name: list(tensor.dims) for tensor in graph.initializer}
    products = [weights[node.input[1]] for node in graph.node if node.op_type == "MatMul" and node.input[1] in weights]
    assert len(products) == 7 * 2 + 1
    assert [32, 5] in products
    assert [5, 32] in products


def test_a_model_that_takes_other_inputs_is_refused_with_the_alternative(tmp_path: Path) -> None:
    bloom = BloomForCausalLM(BloomConfig(vocab_size=9, hidden_size=16, n_layer=1, n_head=2))
    hybrid = tiny_model("llama")
    hybrid.config.layer_types = ["full_attention", "linear_attention", "full_attention"]
    for model, reason in ((bloom, "takes no position_ids"), (hybrid, "another cache .*: linear_attention")):
        with pytest.raises(UnsupportedModelError, match=rf"{reason}.*--to linear-pairs"):
            export_onnx(model, byte_tokenizer(), tmp_path)
