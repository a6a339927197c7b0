from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.quantizers import AutoHfQuantizer, AutoQuantizationConfig

from grasp.compression.quantize import quantize_
from grasp.errors import CheckpointError
from grasp.method.storage import Storage
from grasp.model import hf_quantizer
from grasp.model.hf_quantizer import (
    FORMAT_VERSION,
    GraspHfQuantizer,
    GraspQuantizationConfig,
    mark_compressed,
    register,
)
from grasp.model.lowrank_linear import LowRankLinear
from tests.checkpoint_edits import edit_config, edit_tensors
from tests.lowrank_models import assert_same_state, compressed_model, logits, ranks
from tests.tiny_models import FAMILIES, IMAGE_TEXT, tiny_batches, tiny_model

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The checkpoint of a tiny Qwen2: q, k and v have biases."""
    compressed_model("qwen2").save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "dtype", "tied"),
    [
        (family, torch.bfloat16 if number % 2 else torch.float32, number % 3 == 0)
        for number, family in enumerate([*FAMILIES, "llama", IMAGE_TEXT])
    ],
)
def test_loading_gives_the_same_bits_and_logits(tmp_path: Path, family: str, dtype: torch.dtype, tied: bool) -> None:
    model = compressed_model(family, dtype, tie_word_embeddings=tied or family.startswith("gemma3"))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is type(model)
    assert len(ranks(model)) >= 4
    assert ranks(loaded) == ranks(model)
    assert_same_state(loaded, model)
    assert torch.equal(logits(loaded), logits(model))
    assert not any(hasattr(loaded.get_submodule(name), "weight") for name in ranks(loaded))
    embedding, head = loaded.get_input_embeddings().weight, loaded.get_output_embeddings().weight
    assert (embedding is head) == model.config.tie_word_embeddings


def test_a_loaded_model_saves_the_same_files_again(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(again)
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_only_a_compressed_model_is_saved_with_the_remedy(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    assert not hasattr(model.config, "transformers_weights")
    copy.deepcopy(model).save_pretrained(tmp_path / "copy", max_shard_size="40KB")
    model.dequantize().save_pretrained(tmp_path / "dense")
    remedies = [
        json.loads((folder / "config.json").read_text()).get("transformers_weights")
        for folder in (saved, tmp_path / "copy", tmp_path / "dense")
    ]
    assert remedies == [hf_quantizer.NEEDS_GRASP, hf_quantizer.NEEDS_GRASP, None]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    assert_same_state(again, AutoModelForCausalLM.from_pretrained(saved))


@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_the_umask_decides_who_reads_the_weights(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        compressed_model("llama").save_pretrained(tmp_path / "model")
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "model").iterdir()} == {0o666 & ~umask}


def test_a_refused_save_leaves_the_configuration_as_it_was(tmp_path: Path) -> None:
    model = compressed_model("llama")
    (tmp_path / "model/config.json").mkdir(parents=True)
    with pytest.raises(IsADirectoryError):
        model.save_pretrained(tmp_path / "model")
    assert "save_pretrained" not in vars(model.config)


def test_a_loaded_model_carries_the_marks_of_a_compressed_one(saved: Path) -> None:
    model, loaded = compressed_model("qwen2"), AutoModelForCausalLM.from_pretrained(saved)
    for attribute in ("is_quantized", "quantization_method"):
        assert getattr(loaded, attribute) == getattr(model, attribute)
    assert loaded.config.quantization_config == model.config.quantization_config
    assert loaded.config._is_quantized == model.config._is_quantized
    quantizer = loaded.hf_quantizer
    assert quantizer.is_serializable()
    assert quantizer.is_trainable
    assert quantizer.is_qat_trainable
    assert quantizer.is_compileable


def test_shards_load_to_the_same_bits(tmp_path: Path) -> None:
    model = compressed_model()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_device_map_auto_loads_to_the_same_bits(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved, device_map="auto")
    assert_same_state(loaded.cpu(), compressed_model("qwen2"))


def test_layers_on_disk_compute_the_same_logits_and_save_the_same_files(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer == 1 else "cpu" for layer in range(3)}
    loaded = AutoModelForCausalLM.from_pretrained(
        saved, device_map={**places, **layers}, offload_folder=tmp_path / "offload"
    )
    assert loaded.get_submodule(UP).U.is_meta
    assert torch.equal(logits(loaded), logits(compressed_model("qwen2")))
    with pytest.raises(CheckpointError, match="offloaded"):
        loaded.dequantize()
    with pytest.warns(UserWarning, match="offloaded modules"):  # transformers' own
        loaded.save_pretrained(tmp_path / "again")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), compressed_model("qwen2"))


def test_another_dtype_can_be_asked_for_while_loading_and_after(saved: Path) -> None:
    expected = compressed_model("qwen2").to(torch.bfloat16)
    assert_same_state(AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16), expected)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert_same_state(loaded.half(), compressed_model("qwen2").to(torch.float16))
    assert_same_state(loaded.float().to(torch.bfloat16), loaded)


def test_a_base_model_loads_without_the_head_and_saves_its_module_names(saved: Path, tmp_path: Path) -> None:
    base = AutoModel.from_pretrained(saved)
    assert_same_state(base, compressed_model("qwen2").model)
    base.save_pretrained(tmp_path / "base")
    written = json.loads((tmp_path / "base/config.json").read_text())["quantization_config"]["ranks"]
    assert written == ranks(base)
    assert "layers.1.mlp.up_proj" in written
    assert_same_state(AutoModel.from_pretrained(tmp_path / "base"), base)
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "base").model, base)


def test_a_state_dict_in_memory_loads_like_a_file(saved: Path) -> None:
    model = compressed_model("qwen2")
    kind, config, state = type(model), AutoConfig.from_pretrained(saved), model.state_dict()
    assert_same_state(kind.from_pretrained(None, config=config, state_dict=state), model)
    del state[f"{UP}.Vh"]
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*layers\.1\.mlp\.up_proj\.Vh"):
        kind.from_pretrained(None, config=AutoConfig.from_pretrained(saved), state_dict=state)


def test_tensors_that_transformers_renames_while_loading_are_found_or_missed(saved: Path) -> None:
    tensors = {name.replace("up_proj", "w3"): tensor for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    rename = {"mlp.w3": "mlp.up_proj"}
    assert_same_state(AutoModelForCausalLM.from_pretrained(saved, key_mapping=rename), compressed_model("qwen2"))
    del tensors["model.layers.1.mlp.w3.U"]
    save_file(tensors, saved / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors .*{UP}\.U"):
        AutoModelForCausalLM.from_pretrained(saved, key_mapping=rename)


def test_a_loaded_model_generates_the_same_tokens(saved: Path) -> None:
    settings = GenerationConfig(max_new_tokens=8, do_sample=False, pad_token_id=0)
    tokens = tiny_batches(1)[0]
    expected = compressed_model("qwen2").generate(tokens, generation_config=settings)
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    assert torch.equal(loaded.generate(tokens, generation_config=settings), expected)


def test_a_copy_of_a_loaded_model_is_independent_and_can_be_saved(saved: Path, tmp_path: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    clone = copy.deepcopy(loaded)
    clone.dequantize()
    assert_same_state(loaded, compressed_model("qwen2"))
    copy.deepcopy(loaded).save_pretrained(tmp_path / "copy")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "copy"), loaded)


def test_every_parameter_of_a_loaded_model_gets_the_same_gradient(saved: Path) -> None:
    models = compressed_model("qwen2"), AutoModelForCausalLM.from_pretrained(saved)
    tokens = tiny_batches(1)[0]
    for model in models:
        model(tokens, labels=tokens).loss.backward()
    for (name, parameter), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, other.grad)


def test_saving_writes_the_current_ranks(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    model.set_submodule(UP, LowRankLinear(32, 48, 2, bias=False))
    model.save_pretrained(tmp_path / "changed")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "changed")
    assert ranks(loaded)[UP] == 2
    assert_same_state(loaded, model)


def test_a_model_without_low_rank_layers_left_is_saved_as_an_ordinary_one(saved: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    dense = tiny_model("qwen2")
    for name in ranks(model):
        model.set_submodule(name, dense.get_submodule(name))
    model.save_pretrained(tmp_path / "dense")
    assert "quantization_config" not in json.loads((tmp_path / "dense/config.json").read_text())
    assert not hasattr(model, "hf_quantizer")
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path / "dense"), dense)


def test_a_model_made_from_the_configuration_alone_is_an_ordinary_one(saved: Path) -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(saved))
    mark_compressed(model)
    assert "quantization_config" not in model.config.to_dict()


def test_marking_an_ordinary_model_leaves_no_mark() -> None:
    model = tiny_model("llama")
    before = dict(vars(model.config))
    mark_compressed(model)
    assert vars(model.config) == before
    assert not hasattr(model, "hf_quantizer")


@pytest.mark.parametrize("family", FAMILIES)
def test_dequantizing_gives_the_stock_architecture_with_the_products_of_the_factors(
    tmp_path: Path, family: str
) -> None:
    model, stock = compressed_model(family), tiny_model(family)
    weights = {name: model.get_submodule(name).dense_weight() for name in ranks(model)}
    compressed_logits = logits(model)
    model.dequantize()
    assert [type(m) for m in model.modules()] == [type(m) for m in stock.modules()]
    for name, weight in weights.items():
        dense = model.get_submodule(name).weight
        assert torch.equal(dense.mT if family == "gpt2" else dense, weight)
    torch.testing.assert_close(logits(model), compressed_logits)
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)


def test_dequantizing_keeps_each_layers_dtype_unless_one_is_asked_for(saved: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(saved).to(torch.bfloat16)
    loaded.requires_grad_(False)
    dense = copy.deepcopy(loaded).dequantize()
    assert {p.dtype for p in dense.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in dense.parameters())
    assert {p.dtype for p in loaded.dequantize(torch.float32).parameters()} == {torch.float32}


def test_dequantizing_refuses_a_configuration_that_no_longer_fits() -> None:
    model = compressed_model()
    model.config.num_hidden_layers = 2
    with pytest.raises(CheckpointError, match=r"model\.layers\.2\..*make model\.config fit"):
        model.dequantize()


def test_configuration_survives_json() -> None:
    config = GraspQuantizationConfig(ranks={"a.b": 3, "c": 1})
    values = json.loads(config.to_json_string())
    assert values == {"quant_method": "grasp", "format_version": FORMAT_VERSION, "ranks": {"a.b": 3, "c": 1}}
    assert GraspQuantizationConfig.from_dict(values) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"format_version": 5, "ranks": {}, "novelty": 1}, "format_version 5.*reads 1, 2, 3, 4; upgrade grasp-llm"),
        ({"ranks": {}}, "format_version None"),
        ({"format_version": 1, "ranks": {}, "novelty": 1}, r"unknown keys \['novelty'\]; upgrade grasp-llm"),
        ({"format_version": 1, "ranks": ["a"]}, "must map module names to ranks"),
        ({"format_version": 1, "ranks": {"a.experts.": 1}}, "'a.experts.', which is no path of a module"),
        ({"format_version": 1, "ranks": {"a": 10**400}}, "ranks name the module a, which"),
        ({"format_version": True, "ranks": {}}, "format_version True"),
        ({"format_version": 1, "ranks": {"a": 0}}, "rank of a must be a positive integer, got 0"),
        ({"format_version": 1, "ranks": {"a": 2.0}}, r"rank of a must be a positive integer, got 2\.0"),
        ({"format_version": 1, "ranks": {"a": True}}, "rank of a must be a positive integer, got True"),
        ({"format_version": 2, "ranks": {"a": 1}, "pivoted": "a"}, "pivoted must be a list of module names, got 'a'"),
        ({"format_version": 2, "ranks": {"a": 1}, "pivoted": [1]}, "pivoted must be a list of module names"),
        ({"format_version": 2, "ranks": {"a": 1}, "pivoted": ["b"]}, "pivoted names 'b', which has no rank"),
        ({"format_version": 1, "ranks": {"a": 1}, "pivoted": ["a"]}, "version 1 and pivoted layers, which need 2"),
        ({"format_version": 3, "ranks": {}, "quantized": None}, "quantized must map storages to .*, got None"),
        ({"format_version": 4, "ranks": {}, "shapes": None}, "shapes must map module names to .*, got None"),
    ],
)
def test_unreadable_configurations_are_refused(saved: Path, values: dict[str, Any], message: str) -> None:
    edit_config(saved, lambda config: (config.clear(), config.update(values, quant_method="grasp")))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("ignore", [False, True])
@pytest.mark.parametrize("module", [UP, "model.layers.2.self_attn.q_proj"])
def test_a_rank_that_does_not_match_the_tensors_is_refused(saved: Path, module: str, ignore: bool) -> None:
    edit_config(saved, lambda config: config["ranks"].update({module: 2}))
    with pytest.raises(CheckpointError, match=rf"{module}.* has the shape .*requires "):
        AutoModelForCausalLM.from_pretrained(saved, ignore_mismatched_sizes=ignore)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"model.layers.7.mlp.up_proj": 3}, r"model\.layers\.7\.mlp\.up_proj, which Qwen2ForCausalLM does not have"),
        ({"model.layers.0.mlp": 3}, r"model\.layers\.0\.mlp, a Qwen2MLP; expected a linear layer"),
        ({"model.layers.0.mlp.up_proj": 33}, "rank 33 of .* is above 32"),
        ({"model.layers.0.mlp.up_proj": 10**400}, "rank 1000.* is above 32"),
        ({f"model.layers.{i}.mlp": 1 for i in range(3, 100_000)}, r"layers\.3\.mlp, which .* does not have"),
    ],
)
def test_ranks_of_modules_that_cannot_have_them_are_refused(saved: Path, edit: dict[str, int], message: str) -> None:
    edit_config(saved, lambda config: config["ranks"].update(edit))
    with pytest.raises(CheckpointError, match=message):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("tensor", [f"{UP}.U", f"{UP}.Vh", "model.layers.1.self_attn.q_proj.bias"])
def test_a_checkpoint_without_a_factor_is_refused(saved: Path, tensor: str) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError, match=rf"lacks 1 tensors .*{tensor}"):
        AutoModelForCausalLM.from_pretrained(saved)


@pytest.mark.parametrize("tensor", [f"{UP}.U", f"{UP}.Vh", "model.layers.1.self_attn.q_proj.bias"])
def test_a_factor_of_whole_numbers_is_refused(saved: Path, tensor: str) -> None:
    edit_tensors(saved, lambda tensors: tensors.update({tensor: tensors[tensor].to(torch.int8)}))
    with pytest.raises(CheckpointError, match=rf"{tensor} has the dtype I8; expected one of F64"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_factors_without_a_rank_are_refused(saved: Path) -> None:
    edit_config(saved, lambda config: config["ranks"].pop(UP))
    with pytest.raises(CheckpointError, match=rf"factor {UP}\..* but config\.json has no rank"):
        AutoModelForCausalLM.from_pretrained(saved)


def test_a_dense_checkpoint_cannot_be_compressed_while_loading(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"not compressed; .*compress_"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=GraspQuantizationConfig(ranks={UP: 2}))


def test_a_model_quantised_by_another_method_cannot_be_marked() -> None:
    model = compressed_model()
    model.hf_quantizer = object()
    with pytest.raises(CheckpointError, match=r"quantised \(object\).*unquantised"):
        mark_compressed(model)


def test_registering_again_changes_nothing() -> None:
    register()
    config = AutoQuantizationConfig.from_dict({"quant_method": "grasp", "format_version": 1})
    assert type(config) is GraspQuantizationConfig
    assert type(AutoHfQuantizer.from_config(config)) is GraspHfQuantizer


def joined_model() -> PreTrainedModel:
    """A model whose checkpoints have q, k and v in one matrix."""
    if not hasattr(transformers, "SarvamMoEConfig"):
        pytest.skip("this transformers has no SarvamMoE")
    torch.manual_seed(0)
    sizes = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2}
    config = transformers.SarvamMoEConfig(**sizes, **heads, num_hidden_layers=2, num_experts=8)
    return AutoModelForCausalLM.from_config(config).eval()


def stored_names(folder: Path) -> str:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return " ".join(file.keys())


@torch.no_grad()
def test_projections_that_a_checkpoint_joins_keep_their_own_ranks(tmp_path: Path) -> None:
    model = joined_model()
    for name, rank in (("q_proj", 6), ("v_proj", 4)):  # k stays dense
        path = f"model.layers.1.self_attn.{name}"
        model.set_submodule(path, LowRankLinear.from_dense(model.get_submodule(path), torch.arange(rank)))
    mark_compressed(model)
    model.save_pretrained(tmp_path)
    assert "query_key_value" not in stored_names(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.arange(12)[None]
    assert loaded(ids).logits.equal(model(ids).logits)
    assert loaded.model.layers[1].self_attn.q_proj.rank == 6
    loaded.save_pretrained(tmp_path / "again")
    assert stored_names(tmp_path / "again") == stored_names(tmp_path)
    loaded.dequantize().save_pretrained(tmp_path / "dense")
    assert "query_key_value" in stored_names(tmp_path / "dense")


@torch.no_grad()
def test_projections_that_earlier_versions_have_stored_together_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = joined_model()
    quantize_(model, Storage(8))
    with monkeypatch.context() as patch:
        patch.setattr(hf_quantizer, "_apart", lambda conversions, _: list(conversions))
        del model._weight_conversions
        model.save_pretrained(tmp_path)
    assert "query_key_value.weight_scales" in stored_names(tmp_path)
    ids = torch.arange(12)[None]
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded(ids).logits.equal(model(ids).logits)
    loaded.save_pretrained(tmp_path / "again")
    assert "query_key_value" not in stored_names(tmp_path / "again")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "again")(ids).logits.equal(model(ids).logits)
