from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.errors import CheckpointError
from grasp.model.lowrank_linear import LowRankLinear
from tests.checkpoint_edits import edit_config
from tests.fuzz import damage
from tests.lowrank_models import assert_same_state, logits, pivoted_model

UP, Q = "model.layers.1.mlp.up_proj", "model.layers.1.self_attn.q_proj"


def linears(model: nn.Module) -> dict[str, LowRankLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankLinear)}


def quantization(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())["quantization_config"]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    pivoted_model().save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_gives_the_same_bits_and_logits(tmp_path: Path, dtype: torch.dtype) -> None:
    model = pivoted_model(dtype)
    model.save_pretrained(tmp_path)
    config = quantization(tmp_path)
    assert config["format_version"] == 2
    assert config["pivoted"] == [name for name in linears(model) if ".1." in name]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path, device_map="auto").cpu(), model)


def test_a_loaded_model_saves_the_same_files_again(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(again)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_another_dtype_leaves_the_orders(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    assert_same_state(loaded, pivoted_model().to(torch.bfloat16))


def test_layers_on_disk_compute_the_same_logits(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    options = {"device_map": {**places, **layers}, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(saved, **options)
    assert loaded.get_submodule(UP).U.is_meta
    assert torch.equal(logits(loaded), logits(pivoted_model()))


def test_a_model_without_pivoted_layers_has_a_checkpoint_of_version_1(saved: Path, tmp_path: Path) -> None:
    loaded, expected = AutoModelForCausalLM.from_pretrained(saved), logits(pivoted_model())
    for layer in linears(loaded).values():
        layer.factor_()
    loaded.save_pretrained(tmp_path / "again")
    config = quantization(tmp_path / "again")
    assert config.keys() == {"quant_method", "format_version", "ranks"}
    assert config["format_version"] == 1
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "again")), expected)


def test_dequantizing_gives_the_weights(saved: Path) -> None:
    loaded, model = AutoModelForCausalLM.from_pretrained(saved).dequantize(), pivoted_model()
    assert not linears(loaded)
    torch.testing.assert_close(loaded.get_submodule(Q).weight, linears(model)[Q].dense_weight())
    torch.testing.assert_close(logits(loaded), logits(model))


@pytest.mark.parametrize("kind", damage.FORMS)
@pytest.mark.parametrize("read", [AutoModelForCausalLM.from_pretrained, inspect_checkpoint], ids=["load", "inspect"])
def test_a_form_that_the_files_do_not_have_is_refused_by_name(
    saved: Path, read: Callable[[Path], object], kind: str
) -> None:
    name = damage.damage_form(saved, kind, Random(0))
    if read is inspect_checkpoint and kind in damage.ROWS:
        read(saved)  # the values are not read
        read = AutoModelForCausalLM.from_pretrained
    with pytest.raises(CheckpointError, match=re.escape(name)):
        read(saved)


def test_an_order_in_memory_is_checked_too(saved: Path) -> None:
    model, config = pivoted_model(), AutoConfig.from_pretrained(saved)
    state = model.state_dict()
    damage.FORMS["a row twice"]({}, state, UP)
    with pytest.raises(CheckpointError, match=rf"{UP}\.order is not the order of pivoted factors: 9 distinct rows"):
        type(model).from_pretrained(None, config=config, state_dict=state)


def test_a_pivoted_layer_needs_version_2(saved: Path) -> None:
    edit_config(saved, lambda config: config.update(format_version=1))
    for read in (AutoModelForCausalLM.from_pretrained, inspect_checkpoint):
        with pytest.raises(CheckpointError, match="format_version 1 and pivoted layers, which need 2"):
            read(saved)


def test_inspection_counts_numbers_and_bytes(saved: Path) -> None:
    model = pivoted_model()
    found = inspect_checkpoint(saved)
    modules = {module.name: module for module in found.modules}
    assert {name for name, module in modules.items() if module.form == "pivoted"} == {
        n for n in linears(model) if ".1." in n
    }
    layer = linears(model)[Q]
    assert layer.order is not None
    parameters = sum(parameter.numel() for parameter in layer.parameters())
    assert modules[Q].parameters == parameters
    assert modules[Q].bytes == 4 * (parameters + layer.out_features)
    assert (modules[Q].out_features, modules[Q].in_features) == (layer.out_features, layer.in_features)
    assert found.parameters == sum(parameter.numel() for parameter in model.parameters())
