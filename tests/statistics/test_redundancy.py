from __future__ import annotations

import itertools

import pytest
import torch

from grasp.errors import NonFiniteError
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import decoder
from grasp.statistics.redundancy import block_influence
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


def naive_block_influence(model: torch.nn.Module, tokens: torch.Tensor) -> list[float]:
    """From the library's own hidden states; the last of them is after the final norm, so the last layer is redone."""
    before_norm: list[torch.Tensor] = []
    norm = decoder(model).norm
    assert norm is not None
    handle = norm.register_forward_pre_hook(lambda _, args: before_norm.append(args[0]))
    with torch.no_grad():
        states = list(model(tokens, output_hidden_states=True).hidden_states)
    handle.remove()
    states[-1] = before_norm[0]
    cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in itertools.pairwise(states)]
    return [(1 - cosine).mean().item() for cosine in cosines]


@pytest.mark.parametrize("family", FAMILIES)
def test_is_the_mean_cosine_distance_and_the_last_layer_is_measured_before_the_final_norm(family: str) -> None:
    model, batches = tiny_model(family, torch.float64), tiny_batches(2)
    expected = naive_block_influence(model, torch.cat(batches))
    scores = block_influence(model, [CalibrationBatch(batch) for batch in batches])
    assert scores == pytest.approx(expected, rel=1e-9)


def test_padding_is_not_counted() -> None:
    model = tiny_model("llama", torch.float64)
    tokens = tiny_batches(1, batch_size=1, length=8)[0]
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = torch.arange(12)[None] < 8
    alone = block_influence(model, [CalibrationBatch(tokens)])
    assert block_influence(model, [CalibrationBatch(padded, mask)]) == pytest.approx(alone, rel=1e-12)


def test_a_layer_without_effect_scores_zero() -> None:
    model = tiny_model("llama", torch.float64)
    layer = decoder(model).layers[1]
    with torch.no_grad():
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    scores = block_influence(model, [CalibrationBatch(tiny_batches(1)[0])])
    assert scores[1] == pytest.approx(0, abs=1e-12)
    assert min(scores[0], scores[2]) > 1e-3


def test_non_finite_hidden_states_are_reported_with_their_layers() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        decoder(model).layers[1].mlp.down_proj.weight.fill_(float("nan"))
    with pytest.raises(NonFiniteError, match=r"layers \[1, 2\] are NaN"):
        block_influence(model, [CalibrationBatch(tiny_batches(1)[0])])
