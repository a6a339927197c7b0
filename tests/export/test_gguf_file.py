from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from grasp.bench.decoding import difference
from grasp.bench.yardstick import Case, Yardstick
from grasp.errors import UnsupportedModelError
from grasp.evaluation.generation import first_logits
from grasp.export.gguf_file import write_gguf
from tests.command_line import grasp, grasp_below, save_tiny_model
from tests.tiny_models import tiny_model

LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 = {**LLAMA3, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
MODELS = [("llama", {}), ("llama", {"rope_parameters": LLAMA3}), ("llama", {"rope_parameters": LINEAR})]
MODELS = [*MODELS, ("qwen2", {}), ("qwen3", {"tie_word_embeddings": True})]


@pytest.mark.parametrize(("weight_type", "tolerance"), [("F32", 1e-6), ("F16", 2e-3), ("BF16", 2e-2), ("Q8_0", 3e-2)])
def test_a_written_gguf_file_is_the_same_model(weight_type: str, tolerance: float, tmp_path: Path) -> None:
    model = tiny_model("llama")
    write_gguf(model, tmp_path / "model.gguf", weight_type)
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf", dtype=torch.float32)
    expected, got = (first_logits(same, prompt_tokens=20) for same in (model, read))
    assert difference(got, expected) < tolerance


@pytest.mark.slow
def test_a_file_that_is_cut_short_is_not_left(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    convert = ["convert", "tiny", "--to", "gguf", "-o"]
    assert grasp(*convert, "whole", cwd=tmp_path).returncode == 0
    limit = (tmp_path / "whole/model.gguf").stat().st_size - 1
    run = grasp_below(limit, *convert, "cut", cwd=tmp_path)
    assert run.returncode == 2
    assert f"model.gguf has {limit} of {limit + 1} bytes" in run.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"tiny", "whole"}


@pytest.mark.parametrize(("family", "values"), MODELS)
def test_llama_cpp_decodes_the_same_tokens(family: str, values: dict[str, object], tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    model, sizes = tiny_model(family, **values), Case(2, 40, 8, 0)
    write_gguf(model, tmp_path / "model.gguf", "F32")
    loaded = Yardstick("llama.cpp", tmp_path / "model.gguf", model)
    loaded.prepare(sizes)
    agreement = loaded.agreement(sizes)
    loaded.close()
    assert agreement.same == agreement.tokens
    assert agreement.apart < 5e-3  # keys and values are F16


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gpt2", {}, "expected LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM, got GPT2LMHeadModel"),
        ("llama", {"attention_bias": True}, "no biases in k_proj, o_proj, q_proj, v_proj"),
        ("llama", {"rope_parameters": {**LINEAR, "rope_type": "dynamic"}}, "got 'dynamic'"),
        ("qwen2", {"rope_parameters": LINEAR}, "of the type default, got 'linear'"),
        ("qwen2", {"layer_types": ["sliding_attention"] * 3}, "sliding window"),
        ("llama", {"hidden_act": "gelu"}, "the activation silu, got 'gelu'"),
    ],
)
def test_other_models_are_refused_with_the_alternative(
    family: str, values: dict[str, object], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"{message}.*convert_hf_to_gguf\.py"):
        write_gguf(tiny_model(family, **values), tmp_path / "model.gguf", "F16")
    assert not list(tmp_path.iterdir())
