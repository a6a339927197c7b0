"""``data/before-house`` was written before ``grasp`` was divided into packages."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.model.lowrank_linear import LowRankLinear

CHECKPOINT = Path(__file__).parent / "data/before-house"


@torch.no_grad()
def test_a_checkpoint_of_an_earlier_version_gives_the_logits_it_gave_then() -> None:
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT)
    stored = load_file(CHECKPOINT.with_name("before-house-logits.safetensors"))
    assert {name: m.rank for name, m in model.named_modules() if isinstance(m, LowRankLinear)} == {
        "model.layers.1.self_attn.q_proj": 4,
        "model.layers.1.self_attn.k_proj": 3,
        "model.layers.1.self_attn.v_proj": 3,
        "model.layers.1.self_attn.o_proj": 4,
        "model.layers.1.mlp.gate_proj": 5,
        "model.layers.1.mlp.up_proj": 5,
        "model.layers.1.mlp.down_proj": 5,
    }
    assert model.lm_head.weight is model.model.embed_tokens.weight
    torch.testing.assert_close(model(stored["input_ids"]).logits, stored["logits"])


def test_the_report_of_an_earlier_version_loads_and_fits_its_checkpoint() -> None:
    report = CompressionReport.load(CHECKPOINT)
    assert report.redundant_layers == (1,)
    assert report.config["retain_ratio"] == 0.6
    assert {module.name: module.rank for module in report.compressed} == {
        module.name: module.rank for module in inspect_checkpoint(CHECKPOINT).modules
    }
    assert report.after.parameters == inspect_checkpoint(CHECKPOINT).parameters
