from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.model.batch import CalibrationBatch
from grasp.model.hooks import hooked
from grasp.statistics import loss
from grasp.statistics.loss import (
    Teacher,
    body_of,
    divergence_and_grad,
    divergences,
    drawn_labels,
    loss_and_grad,
    nll_and_grad,
    slice_rows,
    uniform_draws,
)
from tests.tiny_models import FAMILIES, tiny_batches, tiny_model


def in_parts(model: PreTrainedModel, batch: CalibrationBatch) -> tuple[float, Tensor]:
    with torch.no_grad():
        body = body_of(model, batch)
    return loss_and_grad(model, body, batch)


@pytest.mark.parametrize("tokens_at_once", [1, 7, 100])
@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_to_the_whole(family: str, tokens_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "slice_rows", lambda vocabulary: tokens_at_once)
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
    monkeypatch.setattr(loss, "slice_rows", lambda vocabulary: 7)
    model, other = tiny_model(family, torch.float64), tiny_model(family, torch.float64, seed=1)
    tokens = tiny_batches(1)[0]
    with torch.no_grad():
        bodies = [body_of(each, CalibrationBatch(tokens)) for each in (model, other)]
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


def test_a_slice_has_so_many_bytes_but_not_too_few_tokens() -> None:
    assert [slice_rows(vocabulary) for vocabulary in (49_152, 262_144)] == [170, 128]


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


def check_sum_and_gradient(
    by_hand: Callable[[Tensor], tuple[float, Tensor]], logits: Tensor, wide: Tensor, expected: Tensor
) -> None:
    expected.backward()
    before = logits.clone()
    value, grad = by_hand(logits)
    assert torch.equal(logits, before)
    assert value == pytest.approx(expected.item(), rel=1e-6)
    assert grad.dtype == logits.dtype
    assert wide.grad is not None
    torch.testing.assert_close(grad, wide.grad.to(logits.dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_divergence_by_hand_is_that_of_pytorch(dtype: torch.dtype) -> None:
    logits, wanted = torch.randn(2, 5, 11, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    q, p = wide.log_softmax(-1), wanted.log_softmax(-1, dtype=wide.dtype)
    expected = torch.nn.functional.kl_div(q, p, reduction="sum", log_target=True)
    check_sum_and_gradient(partial(divergence_and_grad, wanted=wanted), logits, wide, expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_gradient_by_hand_is_that_of_autograd(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 11, generator=torch.Generator().manual_seed(0)).mul(4).to(dtype)
    labels = torch.tensor([0, 10, 3, 3, 7])
    wide = logits.to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    expected = torch.nn.functional.cross_entropy(wide, labels, reduction="sum")
    check_sum_and_gradient(partial(nll_and_grad, labels=labels), logits, wide, expected)


def test_labels_are_drawn_as_often_as_they_are_probable() -> None:
    probabilities = torch.tensor([[0.5, 0.0, 0.25, 0.25], [0.0, 1.0, 0.0, 0.0]], dtype=torch.float64)
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    for row, counts in zip(probabilities, ([500, 0, 250, 250], [0, 1000, 0, 0]), strict=True):
        drawn = drawn_labels(row.expand(1000, 4), draws)
        assert drawn.bincount(minlength=4).tolist() == counts
    ends = torch.tensor([0.0, 1 - 2**-24])  # the largest fp32 number below 1, where sums of fp32 may end
    assert set(drawn_labels(torch.full((2, 7), 1 / 7), ends).tolist()) == {0, 6}


def test_the_gradients_of_drawn_labels_have_the_covariance_of_the_fisher_information() -> None:
    logits, count = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=torch.float64), 20_000
    draws = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    labels = torch.full((count,), 3)
    nll, grad = nll_and_grad(logits.expand(count, 5), labels, draws)
    p = logits.softmax(0)
    assert nll == pytest.approx(-count * p[3].log().item())  # of the observed labels
    torch.testing.assert_close(grad.mT @ grad / count, p.diag() - p.outer(p), rtol=0, atol=1e-3)
    torch.testing.assert_close(grad.mean(0), torch.zeros(5, dtype=torch.float64), rtol=0, atol=1e-4)


def test_the_draws_of_a_sequence_do_not_depend_on_its_batch_or_its_padding() -> None:
    one, two = torch.arange(6) % 5, torch.arange(3) + 1
    tokens, mask = torch.stack([one, torch.cat([two, torch.zeros(3, dtype=torch.int64)])]), torch.ones(2, 6) > 0
    mask[1, 3:] = False
    together = uniform_draws(CalibrationBatch(tokens, mask))
    apart = [uniform_draws(CalibrationBatch(sequence[None])) for sequence in (one, two)]
    assert together.tolist() == torch.cat(apart).tolist()
    assert together.unique().numel() == 7
    assert ((together >= 0) & (together < 1)).all()


def test_the_gradient_of_drawn_labels_is_that_of_a_text_that_has_them() -> None:
    model, batch = tiny_model("llama", torch.float64), CalibrationBatch(tiny_batches(1)[0])
    with torch.no_grad():
        body = body_of(model, batch)
    loss_of_text, grad = loss_and_grad(model, body, batch, samples_labels=True)
    hidden = body.hidden[:, :-1].detach().flatten(0, 1).requires_grad_()
    logits = model.lm_head(hidden)
    drawn = drawn_labels(logits.detach().softmax(-1), uniform_draws(batch))
    (expected,) = torch.autograd.grad(torch.nn.functional.cross_entropy(logits, drawn, reduction="sum"), hidden)
    torch.testing.assert_close(grad[:, :-1].flatten(0, 1), expected)
    assert loss_of_text == loss_and_grad(model, body, batch)[0]
