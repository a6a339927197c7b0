"""Checkpoints with quantised modules: low-rank, dense and embeddings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.compression.eligible import eligible_targets
from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.loading import load_model
from grasp.model.hf_quantizer import require_floating
from grasp.model.lowrank_linear import set_backend_
from grasp.model.quantized_linear import QUANTIZED, QuantizedLowRankLinear
from grasp.model.size import bytes_by_dtype, model_size
from grasp.recovery import trainable_factors
from tests.checkpoint_edits import edit_config, edit_tensors
from tests.lowrank_models import assert_same_state, logits
from tests.quantized_models import quantized_model
from tests.tiny_models import IMAGE_TEXT, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

UP, DENSE = "model.layers.1.mlp.up_proj", "model.layers.0.mlp.up_proj"


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A Qwen2, whose q, k and v have biases, with tied embeddings; low-rank factors and linears in int4."""
    quantized_model("qwen2", "int4/32", tie_word_embeddings=True).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "storage", "dtype", "tied"),
    [
        ("llama", "int8", torch.float32, True),
        ("gpt2", "int4/32", torch.bfloat16, False),
        ("gemma3", "int4", torch.float32, True),
        ("gpt_neox", "int4/64", torch.bfloat16, False),
        ("opt", "int8", torch.float32, True),
        ("mixtral", "int4/32", torch.float32, False),
        ("qwen2", "fp8", torch.bfloat16, True),
        (IMAGE_TEXT, "int8", torch.bfloat16, True),
    ],
)
def test_a_model_saves_loads_and_dequantizes(
    tmp_path: Path, family: str, storage: str, dtype: torch.dtype, tied: bool
) -> None:
    model = quantized_model(family, storage, dtype, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_state(loaded, model)
    expected = logits(model)
    assert torch.equal(logits(loaded), expected)
    assert not any(p.requires_grad for m in loaded.modules() if isinstance(m, QUANTIZED) for p in m.parameters())
    embedding, head = loaded.get_input_embeddings(), loaded.get_output_embeddings()
    assert (embedding.weight is head.weight) == (embedding.weight_scales is head.weight_scales) == tied

    size, found = model_size(loaded), inspect_checkpoint(tmp_path)
    assert (found.parameters, found.bytes) == (size.parameters, size.bytes)
    parts = bytes_by_dtype(loaded)
    assert sum(parts.values()) == size.bytes
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    values = [m for m in loaded.modules() if isinstance(m, QuantizedLowRankLinear)]
    assert parts[storage.partition("/")[0]] >= sum(m.U.nbytes + m.Vh.nbytes for m in values) > 0
    assert found.quantized.keys() == {name for name, m in model.named_modules() if isinstance(m, QUANTIZED)}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLowRankLinear)}
    assert {(m.name, m.rank, m.form, m.in_features, m.storage) for m in found.modules} == {
        (name, m.rank, m.form, m.in_features, storage) for name, m in layers.items()
    }

    assert not loaded.hf_quantizer.is_trainable
    loaded.dequantize()
    stock = tiny_model(family, tie_word_embeddings=tied)
    assert [type(module) for module in loaded.modules()] == [type(module) for module in stock.modules()]
    assert (loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight) == tied
    torch.testing.assert_close(
        logits(loaded), expected, **({"rtol": 0.0, "atol": 0.1} if dtype == torch.bfloat16 else {})
    )
    assert model_size(loaded).parameters == sum(p.numel() for p in stock.parameters())


def test_a_dense_model_can_be_quantised_without_low_rank_layers(tmp_path: Path) -> None:
    model = quantized_model("llama", low_rank=False)
    model.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (values["format_version"], values["ranks"], "pivoted" in values) == (3, {}, False)
    assert set(values["quantized"]) == {"int8"}
    assert_same_state(AutoModelForCausalLM.from_pretrained(tmp_path), model)
    parts = {part.name: part for part in inspect_checkpoint(tmp_path).parts}
    assert parts["mlp, dense, int8"].parameters == 3 * 3 * 32 * 48
    assert parts["embeddings, int8"].bytes == 97 * (32 + 4)


def test_a_loaded_model_saves_the_same_files_again(saved: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    AutoModelForCausalLM.from_pretrained(saved).save_pretrained(again)
    for name in ("config.json", "model.safetensors"):
        assert (again / name).read_bytes() == (saved / name).read_bytes()


def test_another_dtype_casts_scales_and_leaves_values(saved: Path) -> None:
    state = AutoModelForCausalLM.from_pretrained(saved, dtype="auto").state_dict()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        loaded = AutoModelForCausalLM.from_pretrained(saved, dtype=dtype)
        for name, tensor in loaded.state_dict().items():
            expected = (
                state[name] if state[name].dtype in (torch.int8, torch.uint8, torch.int32) else state[name].to(dtype)
            )
            assert tensor.dtype == expected.dtype
            assert torch.equal(tensor, expected), name
        assert torch.isfinite(logits(loaded)).all()


def test_layers_on_disk_compute_the_same_logits(saved: Path, tmp_path: Path) -> None:
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{layer}": "disk" if layer < 2 else "cpu" for layer in range(3)}
    options = {"device_map": {**places, **layers}, "offload_folder": tmp_path / "offload"}
    loaded = AutoModelForCausalLM.from_pretrained(saved, **options)
    assert loaded.get_submodule(UP).U.is_meta
    assert torch.equal(logits(loaded), logits(AutoModelForCausalLM.from_pretrained(saved)))
    with pytest.raises(CheckpointError, match="offloaded"):
        loaded.dequantize()


def test_a_base_model_loads_without_the_head(tmp_path: Path) -> None:
    model = quantized_model("llama")
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    assert_same_state(base, model.model)
    base.save_pretrained(tmp_path / "base")
    assert_same_state(AutoModel.from_pretrained(tmp_path / "base"), base)


def test_a_model_with_another_head_loads_without_the_output_layer(tmp_path: Path) -> None:
    model = quantized_model("llama")
    assert isinstance(model.lm_head, QUANTIZED)
    model.save_pretrained(tmp_path / "whole")
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path / "whole", pad_token_id=0)
    assert_same_state(classifier.model, model.model)
    assert classifier(torch.arange(9)[None]).logits.shape == (1, 2)


def test_floating_values_in_memory_are_refused_and_never_cast(saved: Path) -> None:
    model = quantized_model("qwen2", "int4/32", tie_word_embeddings=True)
    kind, state = type(model), model.state_dict()
    assert_same_state(kind.from_pretrained(None, config=AutoConfig.from_pretrained(saved), state_dict=state), model)
    state[f"{DENSE}.weight"] = state[f"{DENSE}.weight"].float() + 0.5
    with pytest.raises(CheckpointError, match=rf"{DENSE}\.weight has the dtype torch\.float32; expected U8"):
        kind.from_pretrained(None, config=AutoConfig.from_pretrained(saved), state_dict=state)


def test_another_dtype_after_loading_and_loading_by_name_leave_values(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    model = quantized_model("llama", vocab_size=len(tokenizer))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, _ = load_model(str(tmp_path), dtype="bfloat16", device="cpu")
    assert torch.equal(loaded.get_submodule(UP).U, model.get_submodule(UP).U)
    assert torch.equal(loaded.to(torch.float64).get_submodule(DENSE).weight, model.get_submodule(DENSE).weight)


def test_a_named_backend_runs_quantised_factors() -> None:
    model = quantized_model("llama")
    set_backend_(model, "reference")
    assert {m.backend for m in model.modules() if isinstance(m, QuantizedLowRankLinear)} == {"reference"}
    assert torch.isfinite(logits(model)).all()


def test_a_quantised_model_is_not_compressed_or_trained() -> None:
    model = quantized_model("llama")
    for refused in (eligible_targets, lambda model: require_floating(model.config)):
        with pytest.raises(UnsupportedModelError, match=r"is quantised \(int8\); expected floating weights"):
            refused(model)
    with pytest.raises(UnsupportedModelError, match=r"the factors of .* are quantised; expected floating ones"):
        trainable_factors(model)


QUANTIZED_EDITS: list[tuple[Callable[[dict[str, Any]], object], str]] = [
    (lambda config: config.update(quantized=[UP]), "quantized must map storages to module names, got"),
    (lambda config: config["quantized"].update(int5=[]), "storage 'int5'; expected one of int8, int8/32"),
    (lambda config: config["quantized"].update({"int4/48": []}), "storage 'int4/48'; expected one of"),
    (lambda config: config["quantized"].update({"int4/64": "lm_head"}), "must list names for int4/64, got 'lm_head'"),
    (lambda config: config["quantized"].update({"int4/64": [3]}), "quantized name 3, which is no path"),
    (lambda config: config["quantized"].update({"int4/64": ["a..b"]}), "quantized name 'a..b', which is no path"),
    (lambda config: config["quantized"].update({"int4/64": [UP]}), f"quantized names {UP} twice"),
    (lambda config: config["quantized"]["int8"].append("model.embed_tokens"), "model.embed_tokens twice"),
    (lambda config: config.update(format_version=2), "format_version 2 and quantized layers, which need 3"),
    (lambda config: config["quantized"]["int4/32"].remove(DENSE), rf"{DENSE}\.weight"),
    (lambda config: config["quantized"]["int4/32"].remove(UP), rf"{UP}\.U"),
    (lambda config: config["ranks"].pop(UP), rf"{UP}\."),
    (lambda config: config["quantized"].update({"int4": config["quantized"].pop("int4/32")}), "_scales has the shape"),
    (lambda config: config["quantized"].update({"int8/32": config["quantized"].pop("int4/32")}), "requires|of I8"),
    (
        lambda config: config["quantized"]["int8"].append("model.layers.9.mlp.up_proj"),
        r"model\.layers\.9\.mlp\.up_proj",
    ),
]


@pytest.mark.parametrize("read", [AutoModelForCausalLM.from_pretrained, inspect_checkpoint], ids=["load", "inspect"])
def test_an_edited_configuration_is_refused_by_name(saved: Path, read: Callable[[Path], object]) -> None:
    text = (saved / "config.json").read_text()
    for edit, message in QUANTIZED_EDITS:
        (saved / "config.json").write_text(text)
        edit_config(saved, edit)
        with pytest.raises(CheckpointError, match=message):
            read(saved)


def test_modules_that_cannot_be_quantised_so_are_refused(saved: Path) -> None:
    text = (saved / "config.json").read_text()
    for edit, message in (
        (lambda quantized: quantized["int8"].append("model.norm"), "model.norm, a Qwen2RMSNorm, for int8; expected a"),
        (lambda quantized: quantized["int8"].append("nothing"), "name the module nothing, which Qwen2ForCausalLM"),
        (
            lambda quantized: quantized.update(int4=["lm_head"], int8=["model.embed_tokens"]),
            "different storages for lm_head and model.embed_tokens, which the model ties",
        ),
        (lambda quantized: quantized.update(fp8=["model.embed_tokens"], int8=[]), "for fp8; expected int8"),
    ):
        (saved / "config.json").write_text(text)
        edit_config(saved, lambda config, edit=edit: edit(config["quantized"]))
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(saved)


def _replace(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], object]:
    return lambda tensors: tensors.update({name: change(tensors[name])})


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_replace(f"{UP}.U", Tensor.float), rf"{UP}\.U has the dtype F32; expected one of U8"),
        (_replace(f"{UP}.Vh", lambda t: t.view(torch.int8)), rf"{UP}\.Vh has the dtype I8; expected one of U8"),
        (_replace(f"{UP}.Vh_scales", Tensor.int), rf"{UP}\.Vh_scales has the dtype I32; expected one of F64"),
        (_replace(f"{UP}.U_scales", lambda t: t[:-1].clone()), rf"{UP}\.U_scales has the shape"),
        (_replace(f"{DENSE}.weight", Tensor.float), rf"{DENSE}\.weight has the dtype F32; expected one of U8"),
        (_replace(f"{DENSE}.weight_scales", lambda t: t.repeat(1, 2)), rf"{DENSE}\.weight_scales has the shape"),
        (
            _replace("model.embed_tokens.weight", Tensor.byte),
            r"embed_tokens\.weight has the dtype U8; expected one of I8",
        ),
        (lambda tensors: tensors.pop(f"{UP}.Vh_scales"), rf"{UP}\.Vh_scales"),
        (lambda tensors: tensors.pop(f"{DENSE}.weight_scales"), rf"{DENSE}\.weight_scales"),
        (lambda tensors: tensors.pop(f"{DENSE}.weight"), rf"{DENSE}\.weight"),
    ],
)
def test_damaged_tensors_are_refused_by_name(
    saved: Path, edit: Callable[[dict[str, Tensor]], object], message: str
) -> None:
    edit_tensors(saved, edit)
    for read in (AutoModelForCausalLM.from_pretrained, inspect_checkpoint):
        with pytest.raises(CheckpointError, match=message):
            read(saved)
