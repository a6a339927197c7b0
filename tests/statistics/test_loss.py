from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import hooked
from grasp.model.running import batch_inputs
from grasp.statistics import loss
from grasp.statistics.loss import Teacher, divergences, loss_and_grad, nll_and_grad, without_head
from tests.tiny_models import FAMILIES, VOCABULARY, tiny_batches, tiny_model


def in_parts(model: torch.nn.Module, batch: CalibrationBatch) -> tuple[float, Tensor]:
    with torch.no_grad(), without_head(model) as body:
        model(**batch_inputs(model, batch), use_cache=False)
    return loss_and_grad(model, body, batch)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_whole(family: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * VOCABULARY * tokens_at_once)
    model, tokens = tiny_model(family, torch.float64), tiny_batches(1)[0]
    got, grad = in_parts(model, CalibrationBatch(tokens))
    hidden: list[Tensor] = []
    handle = model.get_decoder().register_forward_hook(lambda *args: hidden.append(args[2][0]))
    logits = model(tokens, use_cache=False).logits
    handle.remove()
    nll = -logits[:, :-1].log_softmax(-1).gather(2, tokens[:, 1:, None]).sum()
    (expected,) = torch.autograd.grad(nll, hidden)
    assert got == pytest.approx(nll.item(), rel=1e-12)
    assert (grad - expected).norm() <= 1e-12 * expected.norm()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_with_a_teacher_the_loss_is_the_divergence_from_its_distribution(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loss, "LOGITS_BYTES", 4 * VOCABULARY * 7)
    model, other = tiny_model(family, torch.float64), tiny_model(family, torch.float64, seed=1)
    tokens = tiny_batches(1)[0]
    bodies = []
    for each in (model, other):
        with torch.no_grad(), without_head(each) as body:
            each(tokens, use_cache=False)
        bodies.append(body)
    got, grad = loss_and_grad(model, bodies[0], CalibrationBatch(tokens), Teacher(other, bodies[1]))
    hidden: list[Tensor] = []
    with hooked(model.get_decoder(), after=lambda _, args, kwargs, output: hidden.append(output[0])):
        q = model(tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    with torch.no_grad():
        p = other(tokens, use_cache=False).logits[:, :-1].softmax(-1)
    divergence = (p * (p.log() - q)).sum()
    (expected,) = torch.autograd.grad(divergence, hidden)
    assert got == pytest.approx(divergence.item(), rel=1e-10)
    several = divergences(model, [bodies[1], bodies[0]], CalibrationBatch(tokens), Teacher(other, bodies[1]))
    assert several[1] == got
    assert several[0] != got
    assert (grad - expected).norm() <= 1e-10 * expected.norm()


def test_the_loss_is_the_one_transformers_computes() -> None:
    model, tokens = tiny_model("llama"), tiny_batches(1)[0]
    with torch.no_grad():
        expected = model(tokens, labels=tokens).loss.item() * 2 * 11
    assert in_parts(model, CalibrationBatch(tokens))[0] == pytest.approx(expected, rel=1e-5)


def test_padding_and_batches_without_targets_are_not_counted() -> None:
    model, tokens = tiny_model("llama", torch.float64), tiny_batches(1)[0]
    mask = torch.ones_like(tokens, dtype=torch.bool)
    mask[0, 5:] = False
    _, grad = in_parts(model, CalibrationBatch(tokens, mask))
    assert not grad[0, 4:].any()
    assert grad[0, :4].any(-1).all()
    mask[:, 1:] = False
    got, grad = in_parts(model, CalibrationBatch(tokens, mask))
    assert got == 0
    assert not grad.any()


def test_the_operations_of_the_head_on_logits_are_part_of_the_loss() -> None:
    model, tokens = tiny_model("gemma3", torch.float64), tiny_batches(1)[0]
    plain = in_parts(model, CalibrationBatch(tokens))[0]
    model.config.final_logit_softcapping = 0.05
    assert in_parts(model, CalibrationBatch(tokens))[0] != pytest.approx(plain, rel=1e-4)


def test_the_model_is_unchanged() -> None:
    model, tokens = tiny_model("llama"), tiny_batches(1)[0]
    before = model(tokens).logits
    in_parts(model, CalibrationBatch(tokens))
    assert torch.equal(model(tokens).logits, before)
    assert "forward" not in model.get_decoder().__dict__
    assert not model.get_decoder()._forward_hooks


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_by_hand_is_that_of_autograd(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    labels = torch.tensor([0, 10, 3, 3, 7])
    wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
    expected.backward()
    before = logits.clone()
    nll, grad = nll_and_grad(logits, labels)
    assert torch.equal(logits, before)
    assert nll == pytest.approx(expected.item(), rel=1e-6)
    assert grad.dtype == dtype
    assert wide.grad is not None
    torch.testing.assert_close(grad, wide.grad.to(dtype))
