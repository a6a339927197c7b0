"""vLLM's greedy tokens are transformers', from the same folder and without flags."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engines import RANKS, cores, greedy, load, run_engine, save_compressed

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def engine_tokens(folder: Path, scratch: Path, **engine: object) -> list[list[int]]:
    tokens, printed = run_engine(folder, scratch, **engine)
    assert tokens is not None, printed[-6000:]
    return tokens


@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2", "mixtral"])
def test_one_process_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / family, family)
    assert engine_tokens(folder, tmp_path) == greedy(load(folder))


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
@pytest.mark.parametrize("family", ["llama", "qwen2", "phi3", "gpt2"])
def test_two_processes_give_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    """Llama's two heads of keys and values are split, Qwen2's one is held by both; Phi-3's and GPT-2's qkv is one."""
    folder = save_compressed(tmp_path / family, family)
    assert engine_tokens(folder, tmp_path, tensor_parallel_size=2) == greedy(load(folder))


def test_compiled_graphs_are_those_of_the_checkpoint_even_where_another_had_its_path(tmp_path: Path) -> None:
    """vLLM keeps compiled graphs on disk: other ranks must not meet the graph of these."""
    for ranks in (RANKS["qwen2"], {name: rank + 1 for name, rank in RANKS["qwen2"].items()}):
        folder = save_compressed(tmp_path / "model", "qwen2", ranks)
        assert engine_tokens(folder, tmp_path, enforce_eager=False) == greedy(load(folder))


def test_a_lora_adapter_works_on_top_of_low_rank_linears(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    adapter, rank, alpha = tmp_path / "adapter", 8, 16
    adapter.mkdir()
    model = load(folder)
    plain = greedy(model)
    tensors: dict[str, torch.Tensor] = {}
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj"):
        path = f"model.layers.0.{name}"
        layer = model.get_submodule(path)
        A, B = torch.randn(rank, layer.in_features) * 0.1, torch.randn(layer.out_features, rank) * 0.1
        tensors |= {f"base_model.model.{path}.lora_{which}.weight": t for which, t in (("A", A), ("B", B))}
        layer.register_forward_hook(
            lambda _, inputs, output, A=A, B=B: output + alpha / rank * (inputs[0] @ A.mT @ B.mT)
        )
    save_file(tensors, adapter / "adapter_model.safetensors")
    targets = ["q_proj", "v_proj", "o_proj", "up_proj"]
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "target_modules": targets, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))

    adapted = greedy(model)
    assert adapted != plain
    assert engine_tokens(folder, tmp_path, adapter=adapter, max_lora_rank=rank) == adapted


# --- checkpoints that are wrong ---------------------------------------------------------------------------------------

QUERY, OUTPUT = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.o_proj"


def edit_config(folder: Path, change: Callable[[dict[str, object]], object]) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config["quantization_config"])
    path.write_text(json.dumps(config))


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "a factor is missing": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors.pop(f"{QUERY}.U")),
        f"{QUERY}.U is not in the checkpoint",
    ),
    "a rank is not the factors'": (
        lambda folder: edit_config(folder, lambda config: config["ranks"].update({QUERY: 10})),
        "has the shape (128, 9), config.json calls for (128, 10)",
    ),
    "a rank is missing beside others": (
        lambda folder: edit_config(folder, lambda config: config["ranks"].pop(QUERY)),
        f"the checkpoint has the factor {QUERY}.",
    ),
    "a rank is missing": (
        lambda folder: edit_config(folder, lambda config: config["ranks"].pop(OUTPUT)),
        "model.layers.0.self_attn.o_proj.U",
    ),
    "a weight is dense": (
        lambda folder: edit_tensors(
            folder,
            lambda tensors: tensors.update({f"{QUERY}.weight": tensors.pop(f"{QUERY}.U") @ tensors.pop(f"{QUERY}.Vh")}),
        ),
        f"the checkpoint has a dense {QUERY}.weight, but config.json the rank 9",
    ),
    "a number is none": (
        lambda folder: edit_tensors(folder, lambda tensors: tensors[f"{OUTPUT}.Vh"].fill_(float("nan"))),
        f"{OUTPUT}.Vh is not in the checkpoint, or has NaN or infinite entries",
    ),
    "the head has a rank": (
        lambda folder: edit_config(folder, lambda config: config["ranks"].update({"lm_head": 4})),
        "config.json has a rank for lm_head, which vLLM serves by ParallelLMHead",
    ),
    "the format is of the future": (
        lambda folder: edit_config(folder, lambda config: config.update({"format_version": 2})),
        "format_version 2, this version of grasp reads 1",
    ),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_checkpoint_is_refused_with_the_reason(wrong: str, tmp_path: Path) -> None:
    spoil, reason = WRONG[wrong]
    folder = save_compressed(tmp_path / "model", "llama")
    spoil(folder)
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert reason in printed


def test_experts_with_ranks_are_refused_with_the_reason(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "mixtral")
    expert = "model.layers.0.mlp.experts.0.w1"
    edit_config(folder, lambda config: config["ranks"].update({expert: 4}))
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert f"config.json has a rank for {expert}" in printed


def test_without_the_plugin_vllm_refuses_the_checkpoint(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    tokens, printed = run_engine(folder, tmp_path, variables={"VLLM_PLUGINS": ""})
    assert tokens is None
    assert "Unknown quantization method: grasp" in printed
