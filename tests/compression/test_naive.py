from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from grasp.compression.naive import SVDLinear, accumulate, insert_svd_, mean_nll, naive_grasp_
from grasp.model.targets import layer_targets
from tests.tiny_models import tiny_batches, tiny_model


def test_svd_layers_compute_what_the_linears_did() -> None:
    model, tokens = tiny_model("gpt2", torch.float64), tiny_batches(1)[0]
    names = [target.name for target in layer_targets(model, 1)[0]]
    with torch.no_grad():
        expected = model(tokens).logits
        insert_svd_(model, names)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=0, atol=1e-10)
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == {
        f"{n}.s" for n in names
    }


def test_the_loss_is_the_one_transformers_computes() -> None:
    model, tokens = tiny_model("llama"), tiny_batches(1)[0]
    with torch.no_grad():
        assert mean_nll(model, tokens).item() == pytest.approx(model(tokens, labels=tokens).loss.item(), rel=1e-6)


def test_the_gradient_is_the_change_of_the_mean_loss() -> None:
    model, tokens = tiny_model("llama", torch.float64), tiny_batches(2)
    (layer,) = insert_svd_(model, ["model.layers.1.mlp.down_proj"]).values()
    accumulate(model, tokens)
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            layer.s[3] += step
            losses.append(sum(mean_nll(model, each).item() for each in tokens) / 2)
    assert layer.s.grad is not None
    assert layer.s.grad[3].item() == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-6)


def test_truncation_keeps_the_groups_asked_for() -> None:
    linear = nn.Linear(5, 4)
    layer, kept, x = SVDLinear(linear), torch.tensor([0, 2]), torch.randn(3, 5)
    U, s, Vh = torch.linalg.svd(linear.weight.detach())
    weight = sum(s[i] * torch.outer(U[:, i], Vh[i]) for i in kept.tolist())
    torch.testing.assert_close(layer.truncated(kept)(x), nn.functional.linear(x, weight, linear.bias))
    assert not any(parameter.requires_grad for parameter in layer.truncated(kept)[0].parameters())


def test_a_later_sweep_sees_what_the_ones_before_have_replaced() -> None:
    names, tokens = [target.name for target in layer_targets(tiny_model("llama"), 1)[0]], tiny_batches(2)
    once, twice = tiny_model("llama", torch.float64), tiny_model("llama", torch.float64)
    first = copy.deepcopy(once)
    together = naive_grasp_(once, tokens, [names], 0.4)
    apart = naive_grasp_(twice, tokens, [names[:4], names[4:]], 0.4)
    alone = naive_grasp_(first, tokens, [names[:4]], 0.4)
    assert {name: apart[name] for name in names[:4]} == alone == {name: together[name] for name in names[:4]}
    assert apart != together
