from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.compression.naive import mean_nll
from grasp.method.basis import BASES
from grasp.method.metrics import METRICS, in_units_of_loss
from grasp.method.svd import DAMPING
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import Target, layer_targets
from grasp.statistics.scores import Scored, gather_scores
from grasp.statistics.sweep import capture_prefix
from tests.tiny_models import tiny_batches, tiny_model

LAYER = 1


def scores(
    model: PreTrainedModel, tokens: list[Tensor], targets: list[Target], basis: str, metric: str
) -> dict[str, Scored]:
    batches = [CalibrationBatch(t) for t in tokens]
    prefix = capture_prefix(model, batches, {LAYER})
    found = gather_scores(prefix, targets, basis=basis, metric=metric)
    return {target.name: make(dense_weight(target.module), None) for target, make in found.items()}


def seen(model: PreTrainedModel, tokens: list[Tensor], target: Target) -> tuple[Tensor, Tensor]:
    """All inputs of a linear and all gradients of the summed loss in its outputs, (T, K) and (T, N), by autograd."""
    xs, outputs, grads = [], [], []
    handle = target.module.register_forward_hook(
        lambda _, args, out: (xs.append(args[0].detach().flatten(0, 1)), outputs.append(out))[0]
    )
    for batch in tokens:
        loss = mean_nll(model, batch) * (batch.shape[0] * (batch.shape[1] - 1))
        grads.append(torch.autograd.grad(loss, [outputs[-1]])[0].flatten(0, 1))
    handle.remove()
    return torch.cat(xs), torch.cat(grads)


def damped_root(rows: Tensor) -> Tensor:
    total, tokens = rows.mT @ rows, len(rows)
    prior = (len(total) + DAMPING * (tokens + len(total))) * total.diagonal().mean() / tokens
    shrunk = (total + prior * torch.eye(len(total), dtype=rows.dtype)) / (tokens + len(total))
    values, vectors = torch.linalg.eigh(shrunk)
    return (vectors * values.sqrt()) @ vectors.mT


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("basis", BASES)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_scores_are_those_of_the_definitions(family: str, basis: str, metric: str) -> None:
    model, tokens = tiny_model(family, torch.float64), tiny_batches(2)
    targets, _ = layer_targets(model, LAYER)
    got = scores(model, tokens, targets, basis, metric)
    assert got.keys() == {target.name for target in targets}
    for target in targets:
        W = dense_weight(target.module)
        x, d = seen(model, tokens, target)
        left = damped_root(d) if BASES[basis].outputs else torch.eye(W.shape[0], dtype=W.dtype)
        right = damped_root(x) if BASES[basis].inputs else torch.eye(W.shape[1], dtype=W.dtype)
        values = torch.linalg.svdvals(left @ W @ right)
        svd, importance, _ = got[target.name]
        torch.testing.assert_close(svd.S, values, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close((svd.U * svd.S) @ svd.Vh, W, rtol=0, atol=1e-8)
        grads = (d @ svd.U) * (x @ svd.Vh.mT)  # of each token in each singular value
        expected = {
            "taylor": (values * grads.sum(0)).abs(),
            "gradient": grads.sum(0).abs(),
            "magnitude": values**2,
            "fisher": values**2 * grads.square().sum(0),
        }[metric]
        assert (importance - expected).norm() <= 1e-6 * expected.norm(), target.name


def test_kfac_magnitudes_say_what_the_fisher_says_where_inputs_and_gradients_are_independent() -> None:
    generator = torch.Generator().manual_seed(0)
    x, d = (torch.randn(20_000, width, generator=generator, dtype=torch.float64) for width in (6, 5))
    W = torch.randn(5, 6, generator=generator, dtype=torch.float64)
    U, S, Vh = torch.linalg.svd(W, full_matrices=False)
    fisher = S**2 * ((d @ U) * (x @ Vh.mT)).square().sum(0)
    torch.testing.assert_close(fisher / len(x), METRICS["magnitude"].score(S, S, S), rtol=0.1, atol=0)


@pytest.mark.parametrize(
    ("basis", "metric", "comparable"),
    [
        ("plain", "taylor", True),
        ("plain", "magnitude", False),
        ("plain", "gradient", False),
        ("whitened", "magnitude", False),
        ("whitened", "fisher", True),
        ("kfac", "magnitude", True),
        ("kfac", "gradient", False),
    ],
)
def test_only_changes_of_the_loss_can_be_compared(basis: str, metric: str, comparable: bool) -> None:
    assert in_units_of_loss(basis, metric) == comparable


@pytest.mark.parametrize(("basis", "metric"), [("kfac", "magnitude"), ("plain", "fisher"), ("plain", "magnitude")])
def test_a_linear_that_does_not_reach_the_loss_has_no_score_where_gradients_decide(basis: str, metric: str) -> None:
    model, tokens = tiny_model("llama", torch.float64), tiny_batches(1)
    targets, _ = layer_targets(model, LAYER)
    mlp = model.model.layers[LAYER].mlp
    mlp.forward = lambda x: 0 * x
    got = scores(model, tokens, targets, basis, metric)
    names = {target.name for target in targets}
    reached = {target.name for target in targets if target.block == "attention"}
    assert got.keys() == (names if metric == "magnitude" and basis == "plain" else reached)
