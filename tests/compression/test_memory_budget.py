from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3NextConfig, Qwen3NextForCausalLM

from grasp.cli.arguments import parse_bytes
from grasp.compression.eligible import eligible_targets
from grasp.compression.memory_budget import MemoryBudget
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError
from grasp.model.batch import CalibrationBatch
from tests.tiny_models import tiny_batches, tiny_model


def gated_delta_model() -> PreTrainedModel:
    """A model that has a layer with gated delta rule, which pads sequences to a multiple of 64 tokens."""
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 32}
    experts = {"num_experts": 4, "num_experts_per_tok": 2}
    layers = ["linear_attention", "full_attention"]
    return Qwen3NextForCausalLM(Qwen3NextConfig(**sizes, **experts, num_hidden_layers=2, layer_types=layers))


@pytest.mark.parametrize(("make", "pads"), [(lambda: tiny_model("llama"), False), (gated_delta_model, True)])
def test_short_sequences_take_more_memory_only_where_a_layer_pads_them(
    make: Callable[[], PreTrainedModel], pads: bool
) -> None:
    model = make()
    linears = [target for layer in eligible_targets(model)[0].values() for target in layer]
    long, short = (CalibrationBatch(torch.zeros(shape, dtype=torch.int64)) for shape in [(2, 32), (32, 2)])

    def budget(*batches: CalibrationBatch) -> int:
        config = GraspConfig(num_layers=1)
        return MemoryBudget.of(model, batches, config, linears, memory=10**10, host_memory=None).device

    assert (budget(long, short) > budget(long)) == pads


@pytest.mark.parametrize(
    "config",
    [
        GraspConfig(num_layers=1, schedule="single-sweep", sweep_dtype="bfloat16"),  # which layer is not known before
        GraspConfig.paper(num_layers=2, sweep_dtype="bfloat16"),  # several sweeps, not the first of which needs most
    ],
)
def test_a_budget_that_is_accepted_suffices_for_each_layer_that_may_be_chosen(config: GraspConfig) -> None:
    with torch.device("meta"):  # copies of such layers take more than what all linears take besides
        model = LlamaForCausalLM(LlamaConfig(hidden_size=2048, intermediate_size=8192, num_hidden_layers=8))
    batches = [CalibrationBatch(tokens) for tokens in tiny_batches(2)]
    by_layer, _ = eligible_targets(model)
    linears = [target for layer in by_layer.values() for target in layer]

    def budget(memory: int) -> MemoryBudget:
        return MemoryBudget.of(model, batches, config, linears, memory=memory, host_memory=None)

    with pytest.raises(OutOfMemoryError) as raised:
        budget(1)
    least = re.search(r"takes at least (\w+)\.", str(raised.value))
    assert least is not None
    accepted = budget(parse_bytes(least[1]))
    for layer, members in by_layer.items():
        assert accepted.spans(members, range(layer, len(by_layer)))
