"""Nothing keeps a model or a layer alive after its last user: it is gone at once, without the garbage collector."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from grasp.compress import compress_
from grasp.config import PRESETS, GraspConfig
from grasp.errors import GraspError
from grasp.evaluation.generation import time_generation
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_model
from grasp.model.batch import CalibrationBatch
from grasp.model.grouping import group_linears_
from grasp.model.layer_removal import can_remove, remove_layers_
from grasp.model.lowrank_linear import LowRankLinear
from grasp.recovery import RecoveryConfig, recover_
from grasp.statistics.loss import mean_loss
from grasp.training_data import TrainingSequence
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

pytestmark = pytest.mark.long

LOCAL = GraspConfig(layers=(0, 2), retain_ratio=0.4)


def compressed() -> PreTrainedModel:
    model = tiny_model("llama")
    compress_(model, tiny_batches(1), LOCAL)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compressed")
    compressed().save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def layer(_: Path) -> Iterable[nn.Module]:
    linear = LowRankLinear(8, 8, 2)
    linear(torch.randn(1, 8))
    return [linear]


def grouped(_: Path) -> Iterable[nn.Module]:
    mlp = nn.ModuleDict({name: LowRankLinear(8, 8, 2) for name in ("gate_proj", "up_proj")})
    group_linears_(mlp)
    mlp["gate_proj"](torch.randn(1, 8))  # the output of up_proj is stored
    return [mlp, *mlp.values()]


def replaced_by_compress(_: Path) -> Iterable[nn.Module]:
    model = tiny_model("llama")
    dense = [module for module in model.modules() if isinstance(module, nn.Linear)]
    compress_(model, tiny_batches(1), LOCAL)
    remaining = {id(module) for module in model.modules()}
    return [module for module in dense if id(module) not in remaining]


def after_failed_compress(_: Path) -> Iterable[nn.Module]:
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    with pytest.raises(GraspError):
        compress_(model, tiny_batches(1), LOCAL)
    return [model]


def preset(name: str) -> Callable[[Path], Iterable[nn.Module]]:
    def run(_: Path) -> Iterable[nn.Module]:
        model = tiny_model("llama")
        compress_(model, tiny_batches(2), PRESETS[name]())
        return [model]

    return run


def by_transformers(folder: Path) -> Iterable[nn.Module]:
    return [AutoModelForCausalLM.from_pretrained(folder)]


def by_load_model(folder: Path) -> Iterable[nn.Module]:
    return [load_model(str(folder), device="cpu")[0]]


def evaluated(_: Path) -> Iterable[nn.Module]:
    model = compressed()
    perplexity(model, torch.arange(3, 90), window=16)
    time_generation(model, prompt_tokens=4, new_tokens=3)
    return [model]


def dequantized(folder: Path) -> Iterable[nn.Module]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    layers = [module for module in model.modules() if isinstance(module, LowRankLinear)]
    model.dequantize()
    return [model, *layers]


def removed(_: Path) -> Iterable[nn.Module]:
    model = compressed()
    can_remove(model, [1])
    mean_loss(model, [CalibrationBatch(tiny_batches(1)[0])])
    dropped = model.model.layers[1]
    remove_layers_(model, [1])
    return [dropped, model]


def not_removable(_: Path) -> Iterable[nn.Module]:
    model = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    assert [layer for layer in range(3) if can_remove(model, [layer])] == [2]  # the others are refused
    return [model]


def recovered(_: Path) -> Iterable[nn.Module]:
    model = compressed()
    sequences = [TrainingSequence(tokens, torch.ones_like(tokens, dtype=torch.bool)) for tokens in tiny_batches(1)[0]]
    recover_(model, sequences, sequences, RecoveryConfig(batch_size=2, micro_batch_size=1, tokens=24))
    return [model]


def copied(_: Path) -> Iterable[nn.Module]:
    model = compressed()
    return [model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))]


def saved(folder: Path) -> Iterable[nn.Module]:
    model = compressed()
    model.save_pretrained(folder / "saved")
    return [model]


USES: dict[str, Callable[[Path], Iterable[nn.Module]]] = {
    **{f"preset {name}": preset(name) for name in PRESETS},
    **{
        use.__name__: use
        for use in (
            *(layer, grouped, replaced_by_compress, after_failed_compress, by_transformers, by_load_model, evaluated),
            *(dequantized, removed, not_removable, recovered, copied, saved),
        )
    },
}


@pytest.mark.parametrize("name", USES)
def test_what_is_no_longer_used_is_gone(name: str, folder: Path) -> None:
    modules = list(USES[name](folder))
    references = [weakref.ref(module) for root in modules for module in root.modules()]
    assert references
    del modules
    assert [type(module).__name__ for reference in references if (module := reference()) is not None] == []
