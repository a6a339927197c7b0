from __future__ import annotations

import itertools
import math

import pytest
import torch

from grasp.errors import NonFiniteError
from grasp.method.distances import angular_distance, least_changing_run
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import decoder
from grasp.statistics.redundancy import block_influence, measure_redundancy
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


def test_padding_counts_nothing() -> None:
    model = tiny_model("llama", torch.float64)
    tokens = tiny_batches(1, batch_size=1, length=8)[0]
    padded = torch.cat([tokens, torch.zeros(1, 4, dtype=torch.int64)], dim=1)
    mask = torch.arange(12)[None] < 8
    alone = block_influence(model, [CalibrationBatch(tokens)])
    assert block_influence(model, [CalibrationBatch(padded, mask)]) == pytest.approx(alone, rel=1e-12)


def test_a_layer_that_changes_nothing_scores_zero() -> None:
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


OUTPUTS = {"gpt2": ("attn.c_proj", "mlp.c_proj"), "gpt_neox": ("attention.dense", "mlp.dense_4h_to_h")}
OUTPUTS |= {"opt": ("self_attn.out_proj", "fc2"), "mixtral": ("self_attn.o_proj", "")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_half_that_adds_nothing_scores_zero_and_the_other_scores_as_the_layer(family: str) -> None:
    batches = tiny_batches(1)
    for silenced, name in enumerate(OUTPUTS.get(family, ("self_attn.o_proj", "mlp.down_proj"))):
        if not name:
            continue
        model = tiny_model(family, torch.float64)
        with torch.no_grad():
            for parameter in decoder(model).layers[1].get_submodule(name).parameters():
                parameter.zero_()
        found = measure_redundancy(model, batches)
        halves = (found.attention[1], found.mlp[1])
        assert halves[silenced] == pytest.approx(0, abs=1e-12)
        assert halves[1 - silenced] == pytest.approx(found.layers[1], rel=1e-9)
        assert min(found.attention[0], found.mlp[0], found.layers[1]) > 1e-3


def test_halves_are_those_between_attention_and_mlp() -> None:
    model, batch = tiny_model("llama", torch.float64), tiny_batches(1)[0]
    layer = decoder(model).layers[2]
    seen: list[torch.Tensor] = []
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layer.register_forward_hook(lambda _, args, output: seen.append(output))
    found = measure_redundancy(model, [batch])
    cosines = [(a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1)) for a, b in itertools.pairwise(seen)]
    assert [found.attention[2], found.mlp[2]] == pytest.approx([(1 - c).mean().item() for c in cosines], rel=1e-9)


def test_runs_are_the_angles_at_the_last_token_that_is_no_padding() -> None:
    model = tiny_model("llama", torch.float64)
    tokens = tiny_batches(1, batch_size=2, length=8)[0]
    with torch.no_grad():
        first, *_, last = model(tokens, output_hidden_states=True).hidden_states[:3]
    a, b = first[:, -1], last[:, -1]
    expected = ((a * b).sum(-1) / a.norm(dim=-1) / b.norm(dim=-1)).arccos().div(math.pi).mean().item()
    padded = torch.cat([tokens, torch.zeros(2, 4, dtype=torch.int64)], dim=1)
    for batch in (CalibrationBatch(tokens), CalibrationBatch(padded, (torch.arange(12) < 8).expand(2, -1))):
        runs = measure_redundancy(model, [batch]).runs
        assert len(runs) == len(runs[0]) == 4
        assert runs[0][2] == pytest.approx(expected, rel=1e-6)
        assert runs[2][0] == pytest.approx(expected, rel=1e-6)
        assert runs[1][1] == pytest.approx(0, abs=1e-6)


def test_angles_are_fractions_of_a_half_turn() -> None:
    x = torch.tensor([1.0, 0.0])
    others = torch.tensor([[2.0, 0.0], [0.0, 3.0], [-1.0, 0.0], [1.0, 1.0]])
    assert angular_distance(x.expand(4, 2), others).tolist() == pytest.approx([0, 0.5, 1, 0.25], abs=1e-4)


def test_the_least_changing_run_is_contiguous_and_the_shallowest_of_equals() -> None:
    places = [0.0, 1.0, 1.5, 2.0, 4.0]  # of the hidden states on a line: layers 1 and 2 change them least
    runs = [[abs(a - b) for b in places] for a in places]
    assert [least_changing_run(runs, count) for count in range(5)] == [(), (1,), (1, 2), (0, 1, 2), (0, 1, 2, 3)]
    with pytest.raises(ValueError, match="4 decoder layers, got num_layers=5"):
        least_changing_run(runs, 5)
