"""What the tests with a real vLLM share: tiny checkpoints, an engine in a process, and transformers' tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.checkpoint.saving import save_checkpoint
from grasp.compression.quantize import quantize_
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.narrowing import narrow_mlp_
from tests.command_line import ROOT, environment
from tests.tiny_models import tiny_model

PROMPTS = [[3, 17, 40, 5, 61], [9] * 12, [50, 51, 52], list(range(3, 90))]  # together they exceed the kernels' rows
NEW_TOKENS = 24
TIMEOUT = 1200  # seconds; the machine may be busy

# In vLLM heads must have 32 dimensions at least. One head of keys and values is shared by all processes.
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 96},
    "qwen2": {"num_key_value_heads": 1, "num_attention_heads": 2, "hidden_size": 64, "intermediate_size": 96},
    "phi3": {"num_key_value_heads": 2, "num_attention_heads": 4, "hidden_size": 128, "intermediate_size": 96},
    "gpt2": {"n_embd": 64, "n_head": 2},
    "mixtral": {"num_key_value_heads": 2, "num_attention_heads": 4, "head_dim": 32, "hidden_size": 128},
}
# Layer 0 has a dense v beside a pivoted q and a factored k, layer 1 a dense q, k and gate, layer 2 has dense MLPs. Half
# of the weight of up in layer 1 has fewer numbers than its factors in one of two processes.
_SEPARATE = {
    **{f"model.layers.0.self_attn.{name}": rank for name, rank in (("q_proj", 9), ("k_proj", 5), ("o_proj", 17))},
    **{f"model.layers.0.mlp.{name}": rank for name, rank in (("gate_proj", 7), ("up_proj", 11), ("down_proj", 13))},
    **{"model.layers.1.self_attn.v_proj": 3, "model.layers.1.mlp.up_proj": 30},
    **{f"model.layers.2.self_attn.{name}": rank for name, rank in (("q_proj", 4), ("k_proj", 6), ("v_proj", 8))},
}
RANKS: dict[str, dict[str, int]] = {
    "llama": _SEPARATE,
    "qwen2": _SEPARATE,
    "phi3": {"model.layers.0.self_attn.qkv_proj": 21, "model.layers.1.mlp.gate_up_proj": 19},
    "gpt2": {"transformer.h.0.attn.c_attn": 21, "transformer.h.1.mlp.c_fc": 19, "transformer.h.1.mlp.c_proj": 15},
    "mixtral": {name: rank for name, rank in _SEPARATE.items() if "self_attn" in name},
}


def save_compressed(
    folder: Path,
    family: str,
    ranks: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    storage: Storage | None = None,
    narrowed: Collection[int] = (),
    **shape: object,
) -> Path:
    """A tiny random checkpoint with some linears low-rank, of which every second one is pivoted.

    With a ``storage``, all linears are quantised, and embeddings and the output layer. The MLPs of ``narrowed`` layers
    keep every other channel.
    """
    model = tiny_model(family, dtype, **{**SHAPES[family], **shape})
    for layer in narrowed:
        mlp = model.get_submodule(f"model.layers.{layer}.mlp")
        channels = torch.arange(0, mlp.down_proj.in_features, 2)
        narrow_mlp_(mlp, channels, mlp.down_proj.weight[:, channels])
    for number, (name, rank) in enumerate((RANKS[family] if ranks is None else ranks).items()):
        layer = LowRankLinear.from_dense(model.get_submodule(name), torch.arange(rank))
        assert number % 2 or layer.pivot_() is None
        model.set_submodule(name, layer)
    if storage is not None:
        quantize_(model, storage)
    return save_checkpoint(model, folder, overwrite=True)


def vllm_environment() -> dict[str, str]:
    """For processes with vLLM: a small KV cache, and NUMA nodes of one core each."""
    return {**environment(), "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_SIM_MULTI_NUMA": "1"}


def run_engine(
    folder: Path,
    scratch: Path,
    prompts: Sequence[Sequence[int]] = PROMPTS,
    *,
    adapter: Path | None = None,
    variables: Mapping[str, str] | None = None,
    **engine: object,
) -> tuple[list[list[int]] | None, str]:
    """Greedy tokens for each prompt, ``None`` if the engine failed, and what it printed."""
    arguments = {
        **{"dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "skip_tokenizer_init": True},
        **{"enable_lora": adapter is not None, "enforce_eager": True, "kv_cache_memory_bytes": 2**26, **engine},
    }
    request, output = scratch / "request.json", scratch / "output.json"
    output.unlink(missing_ok=True)
    asked = {"model": str(folder), "engine": arguments, "prompts": prompts, "new_tokens": NEW_TOKENS}
    request.write_text(json.dumps({**asked, "adapter": None if adapter is None else str(adapter)}))
    done = subprocess.run(
        [sys.executable, "-m", "tests.vllm.generate", str(request), str(output)],
        cwd=ROOT,
        env={**vllm_environment(), "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return (json.loads(output.read_text()) if output.exists() else None), done.stdout


def load(folder: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The checkpoint in transformers."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def greedy(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]] = PROMPTS, new_tokens: int = NEW_TOKENS
) -> list[list[int]]:
    """transformers' tokens, one prompt at a time."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0, "max_new_tokens": new_tokens}
    return [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]


def cores() -> int:
    """Cores this process may use; each process of a tensor-parallel group needs one."""
    return len(os.sched_getaffinity(0))
