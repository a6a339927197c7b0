"""SGLang's greedy tokens are transformers', from the same folder and without flags."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from grasp.method.storage import Storage
from tests.sglang.processes import MISSING, run_engine
from tests.vllm.engines import cores, greedy, load, save_compressed

pytest.importorskip("sglang", reason=MISSING)
pytestmark = pytest.mark.slow

# On a CPU SGLang pads MLPs and experts whose width is no multiple of 64 for each process.
WIDTHS = {"mixtral": {"intermediate_size": 64}, "qwen2": {"intermediate_size": 128, "num_key_value_heads": 2}}


def engine_tokens(folder: Path, scratch: Path, processes: int = 1) -> list[list[int]]:
    tokens, printed = run_engine(folder, scratch, processes)
    assert tokens is not None, printed[-6000:]
    return tokens


@pytest.mark.parametrize("family", ["llama", "phi3", "mixtral"])
def test_one_process_gives_the_tokens_of_transformers(family: str, tmp_path: Path) -> None:
    """Llama has merged linears with several ranks and dense parts, Phi-3 q, k and v in one linear, Mixtral experts."""
    folder = save_compressed(tmp_path / family, family, **WIDTHS.get(family, {}))
    assert engine_tokens(folder, tmp_path) == greedy(load(folder))


@pytest.mark.skipif(cores() < 2, reason="two processes need two cores")
@pytest.mark.parametrize("storage", [None, Storage(4, 64)])
def test_two_processes_give_the_tokens_of_transformers(storage: Storage | None, tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "qwen2", storage=storage, **WIDTHS["qwen2"])
    assert engine_tokens(folder, tmp_path, processes=2) == greedy(load(folder))


@pytest.mark.parametrize("tied", [True, False])
def test_quantised_checkpoints_give_the_tokens_of_transformers(tied: bool, tmp_path: Path) -> None:
    """Low-rank and dense linears, the embedding and the output layer."""
    folder = save_compressed(tmp_path / "model", "llama", storage=Storage(8), tie_word_embeddings=tied)
    assert engine_tokens(folder, tmp_path) == greedy(load(folder))


def test_a_factor_that_the_checkpoint_lacks_or_config_json_does_not_name_is_refused(tmp_path: Path) -> None:
    """SGLang alone would go on with memory that nothing was loaded into."""
    folder = save_compressed(tmp_path / "model", "llama")
    config = json.loads((folder / "config.json").read_text())
    lost = {**config, "quantization_config": {**config["quantization_config"]}}
    lost["quantization_config"]["ranks"] = dict(config["quantization_config"]["ranks"])
    del lost["quantization_config"]["ranks"]["model.layers.0.mlp.down_proj"]
    (folder / "config.json").write_text(json.dumps(lost))
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert "model.layers.0.mlp.down_proj.weight is not in the checkpoint" in printed

    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.0.self_attn.q_proj.U"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert "model.layers.0.self_attn.q_proj.U is not in the checkpoint" in printed


def test_quantised_modules_whose_method_sglang_does_not_ask_for_are_refused(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "mixtral", storage=Storage(8), **WIDTHS["mixtral"])
    tokens, printed = run_engine(folder, tmp_path)
    assert tokens is None
    assert "for which SGLang asked no plugin in this process" in printed


def test_without_the_plugin_sglang_refuses_the_checkpoint(tmp_path: Path) -> None:
    folder = save_compressed(tmp_path / "model", "llama")
    tokens, printed = run_engine(folder, tmp_path, variables={"SGLANG_PLUGINS": "none"})
    assert tokens is None
    assert "Unknown quantization method: grasp" in printed
