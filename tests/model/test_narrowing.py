from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.errors import CheckpointError
from grasp.method.storage import STORAGES
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.layer_removal import remove_layers_
from grasp.model.narrowing import can_narrow, narrow_mlp_, narrowed_shapes
from grasp.model.quantized_linear import quantized_like
from grasp.model.size import model_size
from tests.checkpoint_edits import edit_config
from tests.lowrank_models import assert_same_state, logits
from tests.narrowed_models import CHANNELS, MLP, narrowed_model
from tests.tiny_models import tiny_model


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    narrowed_model().save_pretrained(tmp_path)
    return tmp_path


@torch.no_grad()
def test_a_channel_counts_for_nothing_else() -> None:
    model = tiny_model("qwen2")
    mlp = model.get_submodule(MLP)
    x, others = torch.randn(5, mlp.hidden_size), [i for i in range(mlp.intermediate_size) if i not in CHANNELS.tolist()]
    expected = mlp.down_proj.weight.clone()
    expected[:, others] = 0
    hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    before = torch.get_rng_state()
    narrow_mlp_(mlp, CHANNELS, mlp.down_proj.weight[:, CHANNELS])
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn for weights that are copied
    torch.testing.assert_close(mlp(x), hidden @ expected.mT)
    assert narrowed_shapes(model)[f"{MLP}.up_proj"] == (16, mlp.hidden_size)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen2"])
def test_loading_gives_the_same_bits_and_logits(tmp_path: Path, family: str) -> None:
    model = narrowed_model(family)
    model.save_pretrained(tmp_path)
    config = quantization(tmp_path)
    assert config["format_version"] == 4
    assert set(config["shapes"]) == {f"{MLP}.{name}_proj" for name in ("gate", "up", "down")}
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again" / "config.json").read_bytes() == (tmp_path / "config.json").read_bytes()


def test_inspection_counts_what_is_there(saved: Path) -> None:
    found = inspect_checkpoint(saved)
    assert found.parameters == model_size(narrowed_model()).parameters
    (module,) = found.modules
    assert (module.out_features, module.rank) == (16, 3)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_dequantize_gives_the_architecture_back(tmp_path: Path, family: str) -> None:
    model = narrowed_model(family)
    before = logits(model)
    model.dequantize()
    assert not narrowed_shapes(model)
    assert "quantization_config" not in model.config.to_dict()
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), before, rtol=1e-5, atol=1e-5)


def test_removed_layers_renumber_the_shapes() -> None:
    model = narrowed_model()
    remove_layers_(model, [0])
    assert set(model.config.quantization_config.shapes) == {
        f"model.layers.0.mlp.{name}_proj" for name in ("gate", "up", "down")
    }


def test_quantised_linears_of_other_shapes_load(tmp_path: Path) -> None:
    model = narrowed_model()
    for name in ("gate_proj", "up_proj"):
        path = f"{MLP}.{name}"
        module = quantized_like(model.get_submodule(path), STORAGES["int8"])
        assert module is not None
        model.set_submodule(path, module)
    mark_compressed(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({f"{MLP}.up_proj": [64, 32]}, "more than its"),
        ({f"{MLP}.up_proj": [0, 32]}, "two positive integers"),
        ({f"{MLP}.up_proj": 16}, "two positive integers"),
        ({"model.norm": [1, 2]}, "expected a linear layer"),
        ({"model.layers.9.mlp.up_proj": [1, 2]}, "shapes name the module"),
        ([], "shapes must map"),
    ],
)
def test_bad_shapes_are_refused(saved: Path, shapes: object, message: str) -> None:
    edit_config(saved, lambda config: config.update(shapes=shapes))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


def test_an_older_version_has_no_shapes(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(format_version=3))
    with pytest.raises(CheckpointError, match="narrowed layers, which need 4"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_only_gated_mlps_of_dense_linears_can_be_narrowed() -> None:
    def mlp(model: PreTrainedModel) -> Any:
        return model.get_submodule(MLP)

    assert can_narrow(mlp(tiny_model("llama")))
    assert not can_narrow(mlp(narrowed_model()))
    assert not can_narrow(tiny_model("gpt2").transformer.h[0].mlp)
