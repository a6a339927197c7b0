from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.model.lowrank_linear import LowRankLinear
from grasp.peft import LowRankLora, lowrank_targets
from grasp.workflows.convert import convert_
from tests.lowrank_models import compressed_model, logits, ranks
from tests.tiny_models import tiny_batches

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]  # in all three layers; the first layer is dense
pytestmark = pytest.mark.filterwarnings(
    "ignore:Unsupported layer type:UserWarning"
)  # peft warns of every custom module


def lora(rank: int = 2) -> LoraConfig:
    return lowrank_targets(LoraConfig(r=rank, lora_alpha=3, target_modules=TARGETS, task_type="CAUSAL_LM"))


def with_adapter(model: PreTrainedModel, rank: int = 2, seed: int = 0) -> PeftModel:
    """A model with an adapter that changes the outputs; peft initialises B to 0."""
    adapted = get_peft_model(model, lora(rank))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return adapted


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_a_new_adapter_changes_nothing_and_a_trained_one_adds_its_product() -> None:
    expected = logits(compressed_model("qwen2"))
    assert torch.equal(logits(get_peft_model(compressed_model("qwen2"), lora())), expected)
    adapted = with_adapter(compressed_model("qwen2"))
    dense = compressed_model("qwen2").dequantize()
    for path, _ in dense.named_modules():
        if path.endswith(tuple(TARGETS)):
            linear, layer = dense.get_submodule(path), adapted.base_model.model.get_submodule(path)
            linear.weight.data += layer.get_delta_weight("default")
            low_rank = isinstance(layer.base_layer, LowRankLinear)
            assert (".0." in path) != low_rank == isinstance(layer, LowRankLora)
    assert (logits(adapted) - expected).abs().max() > 0.1
    close(logits(adapted), logits(dense))


def test_only_the_adapter_trains_and_the_loss_falls() -> None:
    model = compressed_model("qwen2")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = get_peft_model(model, lora())
    trained = {name: p for name, p in adapted.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    assert sum("layers.1" in name or "layers.2" in name for name in trained) == 2 * 2 * len(TARGETS)
    optimizer, tokens, losses = torch.optim.AdamW(trained.values(), lr=1e-2), tiny_batches(1)[0], []
    for _ in range(8):
        loss = adapted(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
    after = adapted.unload().state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_saved_adapter_has_only_its_tensors_and_loads_onto_the_checkpoint(tmp_path: Path) -> None:
    compressed_model("qwen2").save_pretrained(tmp_path / "small")
    adapted = with_adapter(AutoModelForCausalLM.from_pretrained(tmp_path / "small"))
    adapted.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in (tmp_path / "adapter").iterdir()} >= {"adapter_config.json"}
    assert json.loads((tmp_path / "adapter/adapter_config.json").read_text())["peft_type"] == "LORA"
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    config = lowrank_targets(LoraConfig.from_pretrained(tmp_path / "adapter"))
    loaded = PeftModel.from_pretrained(model, tmp_path / "adapter", config=config)
    assert torch.equal(logits(loaded), logits(adapted))
    with loaded.disable_adapter():
        assert torch.equal(logits(loaded), logits(compressed_model("qwen2")))


@pytest.mark.parametrize("pivoted", [False, True])
def test_merging_appends_to_the_factors_and_unmerging_removes_the_adapter(tmp_path: Path, pivoted: bool) -> None:
    model = compressed_model("qwen2")
    assert not pivoted or convert_(model, "pivoted")[1] == {}
    plain, before = logits(model), ranks(model)
    adapted = with_adapter(model)
    expected = logits(adapted)
    adapted.merge_adapter()
    close(logits(adapted), expected)
    adapted.unmerge_adapter()
    close(logits(adapted), expected)
    assert ranks(adapted.base_model.model) == {
        f"{name}.base_layer" if name.endswith(tuple(TARGETS)) else name: rank for name, rank in before.items()
    }
    with adapted.disable_adapter():
        close(logits(adapted), plain)
    merged = adapted.merge_and_unload(safe_merge=True)
    grown = {name: rank + 2 * name.endswith(tuple(TARGETS)) for name, rank in before.items()}
    assert ranks(merged) == grown
    close(logits(merged), expected)
    merged.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert ranks(loaded) == grown
    assert torch.equal(logits(loaded), logits(merged))
    close(logits(loaded.dequantize()), expected)


def test_outputs_of_a_group_that_were_computed_with_merged_factors_are_not_used_after_they_are_unmerged() -> None:
    expected = compressed_model("qwen2")(tokens := tiny_batches(1)[0]).logits.detach()
    adapted = with_adapter(compressed_model("qwen2")).eval()
    adapted.merge_adapter()
    with adapted.disable_adapter():  # each layer unmerges in its call, when the first of its group has computed for all
        close(adapted(tokens).logits, expected)


def test_merging_above_the_highest_rank_or_with_non_finite_entries_is_refused() -> None:
    adapted = with_adapter(compressed_model("qwen2"), rank=30)
    with pytest.raises(ValueError, match=r"rank 30 .* above (16|32), .*dequantize"):
        adapted.merge_and_unload()
    adapted = with_adapter(compressed_model("qwen2"))
    adapted.base_model.model.get_submodule("model.layers.1.mlp.up_proj").lora_A["default"].weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match="adapter default has NaN or infinite entries"):
        adapted.merge_and_unload(safe_merge=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init_lora_weights": "pissa"}, "plain LoRA, got init_lora_weights='pissa'"),
        ({"lora_bias": True}, "lora_bias=True; expected"),
        ({"use_dora": True}, "unsupported variant"),
    ],
)
def test_options_that_need_the_dense_weight_are_refused(options: dict[str, object], message: str) -> None:
    config = lowrank_targets(LoraConfig(target_modules=["up_proj"], layers_to_transform=[1], **options))
    with pytest.raises(ValueError, match=message):
        get_peft_model(compressed_model("qwen2"), config)


def test_targets_that_exclude_low_rank_linears_are_refused() -> None:
    with pytest.raises(ValueError, match=r"all-linear.* name the modules"):
        lowrank_targets(LoraConfig(target_modules="all-linear"))
