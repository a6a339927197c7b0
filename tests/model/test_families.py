from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutput

from grasp.bench.shapes import model_calls
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.model.families import FAMILIES, Family, family_of
from grasp.model.grouping import group_linears_
from grasp.model.layer_removal import remove_layers_
from grasp.model.targets import decoder, layer_targets
from grasp.statistics.covariance import distinct_inputs
from tests.tiny_models import VOCABULARY, tiny_batches

WIDTH = 16
MADE_UP = Family(
    "trunk.blocks",
    ("trunk.ln",),
    attention=("mixer",),
    qkv=("wq", "wk", "wv"),
    gate_up=("w1", "w3"),
    index_names=("depth",),
    index_lists=("wide_blocks",),
)


class MadeUpConfig(PreTrainedConfig):
    model_type = "grasp-made-up"

    def __init__(self, num_hidden_layers: int = 3, wide_blocks: tuple[int, ...] = (2,), **values: Any) -> None:
        super().__init__(**values)
        self.num_hidden_layers, self.wide_blocks = num_hidden_layers, list(wide_blocks)
        self.vocab_size, self.hidden_size = VOCABULARY, WIDTH


class Mixer(nn.Module):
    def __init__(self, depth: int) -> None:
        super().__init__()
        self.depth = depth
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        mixed: Tensor = self.wo(F.scaled_dot_product_attention(self.wq(x), self.wk(x), self.wv(x), is_causal=True))
        return mixed


class Block(nn.Module):
    def __init__(self, depth: int, inner: int) -> None:
        super().__init__()
        self.mixer, self.ln1, self.ln2 = Mixer(depth), nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.w1, self.w3 = nn.Linear(WIDTH, inner, bias=False), nn.Linear(WIDTH, inner, bias=False)
        self.w2 = nn.Linear(inner, WIDTH, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.mixer(self.ln1(hidden_states))
        y = self.ln2(x)
        return x + self.w2(F.silu(self.w1(y)) * self.w3(y))


class Trunk(nn.Module):
    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        inner = [32 if depth in config.wide_blocks else 24 for depth in range(config.num_hidden_layers)]
        self.blocks = nn.ModuleList(Block(depth, width) for depth, width in enumerate(inner))
        self.ln = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, **_: Any) -> BaseModelOutput:
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x)
        return BaseModelOutput(self.ln(x))


class MadeUpModel(PreTrainedModel):
    config_class = MadeUpConfig
    base_model_prefix = "trunk"
    _no_split_modules = ("Block",)

    def __init__(self, config: MadeUpConfig) -> None:
        super().__init__(config)
        self.trunk = Trunk(config)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.post_init()

    def get_decoder(self) -> nn.Module:
        return self.trunk

    def forward(self, input_ids: Tensor, **_: Any) -> CausalLMOutput:
        return CausalLMOutput(logits=self.head(self.trunk(input_ids)[0]))


@pytest.fixture
def model() -> Iterator[PreTrainedModel]:
    """A model of a family that has nothing but its row in the table."""
    FAMILIES.append(MADE_UP)
    torch.manual_seed(0)
    yield MadeUpModel(MadeUpConfig()).eval()
    FAMILIES.remove(MADE_UP)


def test_paths_of_decoder_layers_tell_families_apart() -> None:
    assert len({family.layers for family in FAMILIES}) == len(FAMILIES)
    for family in FAMILIES:
        assert family_of(f"{family.layers}.3.mlp.up_proj.weight") is family
        assert family_of(f"base_model.model.{family.layers}.3") is family
    assert family_of("layers.3.mlp.up_proj") == Family("", ())


def test_a_row_is_all_that_a_new_family_needs_to_be_compressed(model: PreTrainedModel) -> None:
    targets, left = layer_targets(model, 1)
    assert left == {}
    assert {target.name.removeprefix("trunk.blocks.1."): target.block for target in targets} == {
        **dict.fromkeys(("mixer.wq", "mixer.wk", "mixer.wv", "mixer.wo"), "attention"),
        **dict.fromkeys(("w1", "w3", "w2"), "mlp"),
    }
    assert [t.name.rpartition(".")[2] for t in distinct_inputs(targets)] == ["wv", "wo", "w3", "w2"]
    report = compress_(model, tiny_batches(), GraspConfig(layers=(1,), retain_ratio=0.5))
    assert len(report.compressed) == 7
    assert group_linears_(model) == [
        ("trunk.blocks.1.w1", "trunk.blocks.1.w3"),
        tuple(f"trunk.blocks.1.mixer.{name}" for name in ("wq", "wk", "wv")),
    ]
    assert torch.isfinite(model(tiny_batches()[0]).logits).all()


def test_its_layers_are_removed_and_renumbered(model: PreTrainedModel) -> None:
    remove_layers_(model, [0])
    assert [block.mixer.depth for block in decoder(model).layers] == [0, 1]
    assert model.config.wide_blocks == [1]
    assert model.config.num_hidden_layers == 2


def test_its_layers_have_the_shapes_of_every_op(model: PreTrainedModel, tmp_path: Path) -> None:
    AutoConfig.register(MadeUpConfig.model_type, MadeUpConfig, exist_ok=True)
    AutoModelForCausalLM.register(MadeUpConfig, MadeUpModel, exist_ok=True)
    model.config.save_pretrained(tmp_path)
    ops = [op for op, _ in model_calls(str(tmp_path), 0.5)]
    assert ops.count("lowrank_linear_grouped") == 2
    assert ops.count("lowrank_glu") == 1
