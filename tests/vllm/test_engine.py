"""vLLM's greedy tokens are transformers', from the same folder and without flags."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from grasp.method.storage import Storage
from tests.vllm.engines import RANKS, cores, greedy, load, run_engine, save_compressed

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow


def engine_tokens(folder: Path, scratch: Path, **engine: object) -> list[list[int]]:
    tokens, printed = run_engine(folder, scratch, **engine)
    assert tokens is not None, printed[-6000:]
    return tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_one_process_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / family, family)
    assert engine_tokens(folder, tmp_path) == greedy(load(folder))


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
@pytest.mark.parametrize("family", ["qwen2", "phi3"])
def test_two_processes_give_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    """Qwen2's one head of keys and values is held by both; Phi-3 has two, and q, k and v in one linear."""
    folder = save_compressed(tmp_path / family, family)
    assert engine_tokens(folder, tmp_path, tensor_parallel_size=2) == greedy(load(folder))


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.skipif(cores() < 2, reason="two cores"))])
def test_narrowed_mlps_give_the_tokens_of_transformers(processes: int, tmp_path: Path) -> None:
    """The MLPs of two layers have half of their channels, with some linears of low rank; a third layer is whole."""
    folder = save_compressed(tmp_path / "model", "qwen2", narrowed=(0, 1), intermediate_size=128)
    assert engine_tokens(folder, tmp_path, tensor_parallel_size=processes) == greedy(load(folder))


@pytest.mark.parametrize(
    ("family", "storage", "tied"), [("mixtral", Storage(4, 32), False), ("llama", Storage(4, 64), True)]
)
def test_quantised_checkpoints_give_the_tokens_of_transformers(
    family: str, storage: Storage, tied: bool, tmp_path: Path
) -> None:
    """Low-rank and dense linears, the embedding and the output layer, which may be tied; the tied one is compiled.

    vLLM's Mixtral does not ask plugins for the method of its embedding.
    """
    folder = save_compressed(tmp_path / "model", family, storage=storage, tie_word_embeddings=tied)
    assert engine_tokens(folder, tmp_path, enforce_eager=not tied) == greedy(load(folder))


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
def test_two_processes_give_the_tokens_of_transformers_of_a_quantised_checkpoint(tmp_path: Path) -> None:
    """Each process has 32 columns of o and 64 of two narrowed down, and groups of 64 columns with one scale."""
    sizes = {"narrowed": (0, 1), "intermediate_size": 256}
    folder = save_compressed(tmp_path / "model", "qwen2", storage=Storage(4, 64), **sizes)
    assert engine_tokens(folder, tmp_path, tensor_parallel_size=2) == greedy(load(folder))


def test_compiled_graphs_are_those_of_the_checkpoint_even_where_another_had_its_path(tmp_path: Path) -> None:
    """vLLM keeps compiled graphs on disk: other ranks must not meet the graph of these."""
    for ranks in (RANKS["qwen2"], {name: rank + 1 for name, rank in RANKS["qwen2"].items()}):
        folder = save_compressed(tmp_path / "model", "qwen2", ranks)
        assert engine_tokens(folder, tmp_path, enforce_eager=False) == greedy(load(folder))


@pytest.mark.parametrize("storage", [None, Storage(8)])
def test_a_lora_adapter_works_on_top_of_low_rank_and_quantised_linears(storage: Storage | None, tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama", storage=storage)
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


# --- checkpoints that are wrong; test_method.py and test_quantized.py have other cases --------------------------------


def test_a_checkpoint_that_lacks_a_factor_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.U"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert "model.layers.0.self_attn.q_proj.U is not in the checkpoint" in printed


def test_a_factor_without_a_rank_is_refused_with_its_name(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]["ranks"]["model.layers.0.mlp.down_proj"]
    (folder / "config.json").write_text(json.dumps(config))
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert re.search(r"no module or parameter named '\S*layers\.0\.mlp\.down_proj\.(U|Vh)'", printed)


def test_without_the_plugin_vllm_refuses_the_checkpoint(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    tokens, printed = run_engine(folder, tmp_path, variables={"VLLM_PLUGINS": ""})
    assert tokens is None
    assert "Unknown quantization method: grasp" in printed
