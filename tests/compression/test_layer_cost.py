from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from transformers import MixtralConfig

from grasp.compression.layer_cost import LiveBytes, Tracer, tracer_for
from grasp.errors import UnsupportedModelError
from grasp.model.targets import layer_targets
from tests.tiny_models import DENSE_FAMILIES, FAMILIES, tiny_model

TOKENS = 2 * 16


def tracer(family: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Tracer:
    config = tiny_model(family, **settings).config
    return Tracer(config, dtype=dtype, device=torch.device("cpu"), batch_size=2, seq_len=16)


def test_bytes_live_from_the_creation_of_a_tensor_to_its_last_reference() -> None:
    x = torch.ones(10, 10, requires_grad=True)  # made outside: never counted
    with LiveBytes() as live:
        y = x * 2
        assert live.now == 400
        z = y.view(100)[:50] + 1  # a view takes nothing
        assert (live.now, live.peak) == (600, 600)
        del y
        assert live.now == 600 - 400  # z needs no y for its gradient
        z.exp_()
        assert live.now == 200
        del z
        gc.collect()
        assert (live.now, live.peak) == (0, 600)


def test_a_layer_costs_its_matrices_and_its_attention() -> None:
    traced = tracer("llama")
    weights = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    attention = 2 * 2 * 2 * 16 * 16 * 32  # two products of (16 x 16) and 32, a multiply and an add, two sequences
    alone, under = traced.layer(0, "none"), traced.layer(0, "enters")
    assert alone.forward == under.forward == 2 * TOKENS * weights + attention
    assert alone.backward == 0
    assert under.backward == 2 * TOKENS * weights + attention * 5 // 2  # which has the scores again
    assert under.saved > alone.saved == TOKENS * 32 * 4  # the output


def test_a_graph_that_starts_at_the_mlp_leaves_attention_out() -> None:
    traced = tracer("llama")
    mlp = [target for target in layer_targets(traced.model, 1)[0] if target.block == "mlp"]
    assert traced.layer(1, "starts", visited=mlp).backward == 2 * TOKENS * 32 * 48  # down_proj's input alone


def test_low_rank_linears_cost_their_factors() -> None:
    traced = tracer("llama")
    ranks = {target.name: 2 for target in layer_targets(traced.model, 1)[0]}
    dense, low = traced.layer(1, "none"), traced.layer(1, "none", ranks=ranks)
    saved = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48 - 2 * (2 * 64 + 2 * 48 + 3 * 80)
    assert dense.forward - low.forward == 2 * TOKENS * saved
    assert traced.layer(1, "none") == dense  # they are taken out again


@pytest.mark.parametrize("family", DENSE_FAMILIES)
def test_every_family_is_run_without_data(family: str) -> None:
    traced = tracer(family)
    for index in range(3):
        cost = traced.layer(index, "enters", visited=layer_targets(traced.model, index)[0])
        assert 0 < cost.forward < cost.backward
        assert cost.saved > 0
        assert cost.transient > 0
    assert all(parameter.device.type == "cpu" for parameter in traced.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_experts_count_for_their_tokens(dtype: torch.dtype, capfd: pytest.CaptureFixture[str]) -> None:
    costs = []
    for count in (1, 2):
        config = MixtralConfig(**{**FAMILIES["mixtral"][2], "num_experts_per_tok": count})
        traced = Tracer(config, dtype=dtype, device=torch.device("cpu"), batch_size=2, seq_len=16)
        costs.append(traced.layer(0, "none").forward)
        assert traced.layer(1, "enters").backward > costs[-1]
    assert costs[1] - costs[0] == 2 * TOKENS * 3 * 32 * 48
    assert "Traceback" not in capfd.readouterr().err


def test_a_loaded_model_has_the_tracer_of_its_configuration_whatever_its_name() -> None:
    model, named = tiny_model("llama"), tiny_model("llama")
    named.config.name_or_path = "/a/folder"
    shape = {"dtype": torch.float32, "device": torch.device("cpu"), "batch_size": 2, "seq_len": 16}
    assert tracer_for(named.config, model_class=type(model), **shape) is tracer_for(model.config, **shape)
    assert named.config.name_or_path == "/a/folder"


def test_operations_that_depend_on_data_are_refused_with_a_remedy() -> None:
    config = tiny_model("mixtral").config  # its experts are picked by a loop over those that have tokens
    with pytest.raises(UnsupportedModelError, match=r"mixtral.*cannot be estimated"):
        Tracer(config, dtype=torch.float32, device=torch.device("cpu"), batch_size=1, seq_len=8)
