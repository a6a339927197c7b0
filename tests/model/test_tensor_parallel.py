from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from grasp.errors import CheckpointError
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from grasp.model.tensor_parallel import connect_, is_split, keep_factors_whole_
from tests.command_line import ROOT, environment
from tests.tiny_models import tiny_model

DENSE = "model.layers.1.self_attn.k_proj"
# path → the local parameters of a layer of rank R, N outputs, K inputs
BY_COLUMNS = {"U": lambda n, k, r: [n // 2, r], "Vh": lambda n, k, r: [r, k], "bias": lambda n, k, r: [n // 2]}
BY_ROWS = {"U": lambda n, k, r: [n, r], "Vh": lambda n, k, r: [r, k // 2], "bias": lambda n, k, r: [n]}


def compressed_model() -> PreTrainedModel:
    """A model with biases, a dense layer, a dense k_proj, a low-rank head, and different ranks, some of them odd."""
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, vocab_size=98)
    targets = [target for layer in (1, 2) for target in layer_targets(model, layer)[0] if target.name != DENSE]
    for rank, target in enumerate(targets, start=3):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    model.set_submodule("lm_head", LowRankLinear.from_dense(model.lm_head, torch.arange(29)))
    mark_compressed(model)
    return model


@pytest.mark.slow
def test_two_processes_compute_the_same_and_save_the_same_checkpoint_as_one(tmp_path: Path) -> None:
    model = compressed_model()
    model.save_pretrained(tmp_path / "small")
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    worker = [ROOT / "tests/tensor_parallel_worker.py", tmp_path / "small", tmp_path / "out", json.dumps("auto")]
    run = subprocess.run(
        [sys.executable, *torchrun, *map(str, worker)], env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stderr
    assert "match nothing" not in run.stderr  # transformers warns of rules that match nothing
    tokens = torch.arange(3, 27).reshape(2, 12)
    expected = {"logits": model(tokens).logits.detach()}
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    expected |= {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    lowrank = {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}
    for rank in range(2):
        saved = load_file(tmp_path / f"out/{rank}.safetensors")
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-5 * float(tensor.abs().max()), msg=name)
        seen = json.loads((tmp_path / f"out/{rank}.json").read_text())
        assert "is split over processes; load the model on one device" in seen["dequantize"]
        for path, layer in lowrank.items():
            parts = BY_ROWS if path.endswith(("o_proj", "down_proj")) else BY_COLUMNS
            for name, _ in layer.named_parameters():
                shape = parts[name](layer.out_features, layer.in_features, layer.rank)
                assert seen["shapes"][f"{path}.{name}"] == shape, path
    again, saved = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out/again", tmp_path / "small"))
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("out/again", "small")]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_a_plan_does_not_split_the_factor_that_its_style_needs_whole() -> None:
    styles = {
        "layers.*.q_proj": "colwise",
        "layers.*.o_proj": "rowwise_split_input",
        "lm_head": "colwise_gather_output",
    }
    plan = {**styles, "layers.*.norm": "sequence_parallel", "layers.*.k_proj": "colwise"}
    before = dict(plan)
    keep_factors_whole_(plan, ["layers.0.q_proj", "layers.11.q_proj", "layers.3.o_proj", "lm_head", "layers.1.norm"])
    added = {name: style for name, style in plan.items() if name not in before}
    assert set(added) == {"layers.*.q_proj.Vh", "layers.*.o_proj.U", "lm_head.Vh"}
    assert set(added.values()) == {"replicated_with_grad_allreduce"}
    assert {name: plan[name] for name in before} == before


def test_a_layer_whose_factors_are_split_inconsistently_is_refused() -> None:
    layer = LowRankLinear(8, 6, 4)
    connect_("q_proj", layer)
    assert not is_split(layer)
    layer.Vh = nn.Parameter(layer.Vh[:2].detach())
    with pytest.raises(CheckpointError, match=r"\(6, 4\) of q_proj\.U and \(2, 8\) of q_proj\.Vh.*tp_plan='auto'"):
        connect_("q_proj", layer)
