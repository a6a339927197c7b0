from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.linear_replacement import capture_streams, choose_block, linear_map, replace_block_, require_added
from benchmarks.remembered import Remembered
from grasp.architecture import decoder
from grasp.calibration import CalibrationBatch
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import UnsupportedModelError
from tests.tiny_models import tiny_batches, tiny_model

CONFIGS = [
    {"metric": "taylor"},
    {"metric": "magnitude"},
    {"basis": "whitened", "metric": "magnitude", "scope": "model"},
    {"basis": "kfac", "metric": "magnitude", "scope": "auto", "allocation": "global"},
]


def batches(count: int = 4) -> list[CalibrationBatch]:
    return [CalibrationBatch(tokens) for tokens in tiny_batches(count)]


@pytest.mark.parametrize("options", CONFIGS, ids=lambda options: f"{options.get('basis', 'plain')} {options['metric']}")
def test_remembered_statistics_compress_as_fresh_ones_do_also_once_they_come_from_the_disk(
    options: dict, tmp_path: Path
) -> None:
    dense, known = tiny_model("llama", torch.float64), batches()
    config = GraspConfig(compression_ratio=0.2, schedule="single-sweep", **options)
    fresh = copy.deepcopy(dense)
    compress_(fresh, known, config)
    first, second = (Remembered(tmp_path / "memory", known, None) for _ in range(2))
    for remembered in (first, first, second):
        model = copy.deepcopy(dense)
        compress_(model, known, config, gather=remembered)
        torch.testing.assert_close(model(known[0].input_ids).logits, fresh(known[0].input_ids).logits)
    assert first.seconds > 0


def residual_stream(first: Tensor, turns: list[float]) -> list[Tensor]:
    hidden = [first]
    for turn in turns:
        hidden.append(hidden[-1] + turn * torch.randn_like(first))
    return hidden


def test_the_block_that_turns_the_hidden_states_least_is_chosen_and_never_the_first_layer() -> None:
    torch.manual_seed(0)
    hidden = residual_stream(torch.randn(50, 16), [0.0, 2.0, 0.1, 0.1, 2.0])
    assert choose_block(hidden, 2) == 2
    assert choose_block(residual_stream(torch.randn(50, 16), [0.0, 0.1, 0.5]), 1) == 1


def test_the_map_is_the_least_squares_solution() -> None:
    y, z = torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    T = linear_map(y * 1e3, z)
    torch.testing.assert_close(T, torch.linalg.lstsq(y * 1e3, z).solution.mT, rtol=0, atol=2e-3)
    torch.testing.assert_close(linear_map(y, y), torch.eye(6, dtype=torch.float64))


def test_a_block_that_is_linear_in_the_mlp_before_it_is_replaced_without_loss() -> None:
    model = tiny_model("llama", torch.float64)
    layers = decoder(model).layers
    with torch.no_grad():  # layers 1 and 2 then add nothing
        for layer in list(layers)[1:]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    tokens = batches(2)
    before = model(tokens[0].input_ids).logits
    gone = replace_block_(model, capture_streams(model, tokens), 2)
    assert gone == (1, 2)
    assert len(decoder(model).layers) == 1
    torch.testing.assert_close(model(tokens[0].input_ids).logits, before, rtol=0, atol=1e-6)


def test_families_with_a_norm_after_their_mlps_are_refused() -> None:
    require_added(tiny_model("llama"), batches(1)[0])
    with pytest.raises(UnsupportedModelError, match="comes between"):
        require_added(tiny_model("gemma3"), batches(1)[0])
