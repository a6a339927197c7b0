from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel

from grasp.errors import CheckpointError
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from grasp.model.tensor_parallel import connect_, is_split, keep_factors_whole_
from tests import forked
from tests.command_line import environment, torchrun_variables
from tests.tiny_models import tiny_model

ROW_WISE = ("o_proj", "down_proj")
DENSE = "model.layers.1.self_attn.k_proj"
# path → the local parameters of a layer of rank R, N outputs, K inputs
BY_COLUMNS = {"U": lambda n, k, r: [n // 2, r], "Vh": lambda n, k, r: [r, k], "bias": lambda n, k, r: [n // 2]}
BY_ROWS = {"U": lambda n, k, r: [n, r], "Vh": lambda n, k, r: [r, k // 2], "bias": lambda n, k, r: [n]}


def linears(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def compressed_model() -> PreTrainedModel:
    """A model with biases, a dense layer, a dense k_proj, a low-rank head, and different ranks, some of them odd.

    Layer 2 and the head are pivoted.
    """
    model = tiny_model("llama", attention_bias=True, mlp_bias=True, vocab_size=98)
    targets = [target for layer in (1, 2) for target in layer_targets(model, layer)[0] if target.name != DENSE]
    for rank, target in enumerate(targets, start=3):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    model.set_submodule("lm_head", LowRankLinear.from_dense(model.lm_head, torch.arange(29)))
    for path, layer in linears(model).items():
        assert ".1." in path or layer.pivot_() is None
    mark_compressed(model)
    return model


@pytest.mark.slow
@pytest.mark.parametrize("hub_kernels", [None, "0", "1"])
def test_two_processes_compute_the_same_and_save_the_same_checkpoint_as_one(
    tmp_path: Path, hub_kernels: str | None
) -> None:
    """Layers that are split by columns are saved without pivots.

    Whatever ``USE_HUB_KERNELS`` is, transformers keeps the forward that splits a layer.
    """
    model = compressed_model()
    model.save_pretrained(tmp_path / "small")
    for path, layer in linears(model).items():
        if not path.endswith(ROW_WISE):
            layer.factor_()
    worker = "import runpy; runpy.run_module('tests.tensor_parallel_worker', run_name='__main__')"
    arguments = [str(tmp_path / "small"), str(tmp_path / "out"), json.dumps("auto")]
    chosen = {} if hub_kernels is None else {"USE_HUB_KERNELS": hub_kernels}
    places = [environment() | chosen | variables for variables in torchrun_variables(2)]
    for run in forked.pythons(worker, arguments, cwd=tmp_path, environments=places):
        assert run.returncode == 0, run.stderr
        assert "match nothing" not in run.stderr  # transformers warns of rules that match nothing
    tokens = torch.arange(3, 27).reshape(2, 12)
    expected = {"logits": model(tokens).logits.detach()}
    for _ in range(2):
        model(tokens, labels=tokens).loss.backward()
    expected |= {f"grad {name}": parameter.grad for name, parameter in model.named_parameters()}
    for rank in range(2):
        saved = load_file(tmp_path / f"out/{rank}.safetensors")
        assert saved.keys() == expected.keys()
        for name, tensor in expected.items():
            torch.testing.assert_close(saved[name], tensor, rtol=0, atol=2e-5 * float(tensor.abs().max()), msg=name)
        seen = json.loads((tmp_path / f"out/{rank}.json").read_text())
        assert "is split over processes; load the model on one device" in seen["dequantize"]
        for style, refusal in seen["refusals"].items():
            assert f"{style}, which cannot split the low-rank layers model.layers.*.self_attn.q_proj: give" in refusal
        for path, layer in linears(model).items():
            parts = BY_ROWS if path.endswith(ROW_WISE) else BY_COLUMNS
            for name, _ in layer.named_parameters():
                rows = layer.out_features - layer.rank * (name == "U" and layer.order is not None)
                assert seen["shapes"][f"{path}.{name}"] == parts[name](rows, layer.in_features, layer.rank), path
    model.save_pretrained(tmp_path / "expected")
    folders = tmp_path / "out/again", tmp_path / "expected"
    again, saved = (load_file(folder / "model.safetensors") for folder in folders)
    assert again.keys() == saved.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in saved.items())
    configs = [json.loads((folder / "config.json").read_text())["quantization_config"] for folder in folders]
    assert configs[0] == configs[1]
    assert configs[0]["pivoted"] == ["model.layers.2.self_attn.o_proj", "model.layers.2.mlp.down_proj"]


def test_a_plan_does_not_split_the_factor_that_its_style_needs_whole() -> None:
    styles = {
        "layers.*.q_proj": "colwise",
        "layers.*.o_proj": "rowwise_split_input",
        "lm_head": "colwise_gather_output",
        "layers.*.router": "replicate",
    }
    plan = {**styles, "layers.*.norm": "sequence_parallel", "layers.*.k_proj": "colwise"}
    before = dict(plan)
    low_rank = ["layers.0.q_proj", "layers.11.q_proj", "layers.3.o_proj", "lm_head", "layers.1.router", "layers.0.up"]
    keep_factors_whole_(plan, low_rank)
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


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Of two processes, of which the other does not exist."""
    dist.init_process_group("fake", rank=0, world_size=2)
    yield init_device_mesh("cpu", (2,))
    dist.destroy_process_group()


def test_pivoted_factors_that_are_not_split_into_blocks_of_rows_are_refused(mesh: DeviceMesh) -> None:
    layer = LowRankLinear(8, 6, 2, pivoted=True)
    connect_("q_proj", layer)
    assert layer.order is not None
    layer.U = nn.Parameter(distribute_tensor(layer.U.detach(), mesh, [Shard(1)], src_data_rank=None))
    with pytest.raises(CheckpointError, match=r"q_proj is pivoted.*Shard\(dim=1\).*grasp convert"):
        connect_("q_proj", layer)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("factor", ["U", "Vh"])
def test_a_split_layer_without_the_forward_that_transformers_gave_it_computes_nothing(
    mesh: DeviceMesh, factor: str, gradients: bool
) -> None:
    layer, x = LowRankLinear(8, 6, 2), torch.randn(3, 8)
    part = distribute_tensor(getattr(layer, factor).detach(), mesh, [Shard(factor == "Vh")], src_data_rank=None)
    setattr(layer, factor, nn.Parameter(part))
    for given in (x, x[:, :4], distribute_tensor(x, mesh, [Replicate()], src_data_rank=None)):
        with torch.set_grad_enabled(gradients), pytest.raises((RuntimeError, NotImplementedError, ValueError)):
            layer(given)
