from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig

from benchmarks.random_pair import write_pair
from grasp.bench.providers import low_rank_layers
from grasp.loading import load_model


def test_both_models_load_and_all_linears_of_the_layers_are_pivoted(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2
    )
    write_pair(config, tmp_path, 0.6)
    dense, pivoted = (load_model(str(tmp_path / name), device="cpu")[0] for name in ("dense", "pivoted"))
    assert dense.dtype == pivoted.dtype == torch.bfloat16
    layers, kept = low_rank_layers(dense, pivoted, "pivoted")
    assert layers == [0, 1]
    assert pivoted.get_submodule("model.layers.1.mlp.up_proj").rank == 32
    assert kept < 1
