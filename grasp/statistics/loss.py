"""The loss of a model and its gradient, computed for a slice of the tokens at a time to bound the logits."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput  # type: ignore[attr-defined]  # documented, not in __all__

from grasp.errors import UnsupportedModelError
from grasp.model.batch import CalibrationBatch, Tokens
from grasp.model.hooks import forwarding, hooked
from grasp.model.running import batch_inputs, evaluating, first_device
from grasp.model.targets import vocabulary_size
from grasp.statistics.processes import ALONE, Processes

LOGITS_BYTES = 2**25  # of fp32 logits per slice, and as many for their gradient; larger slices are slower
LEAST_ROWS = 128  # tokens per slice, whatever the vocabulary: each slice reads the weights of the head
DRAWN_ROWS = 8  # tokens whose labels are drawn at once


class Body(NamedTuple):
    """The output of the backbone of a model, which its head needs."""

    output: Any

    @property
    def hidden(self) -> Tensor:
        """The hidden states at the input of the head, (B, L, H)."""
        hidden: Tensor = self.output[0]
        return hidden


def body_of(model: PreTrainedModel, batch: Tokens) -> Body:
    """Run a model on a batch up to its head, which gets only one token.

    Raises:
        UnsupportedModelError: if the model does not call its ``get_decoder()``.
    """
    outputs: list[Any] = []

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        outputs.append(output)
        return _with_hidden(output, output[0][:1, :1])

    with hooked(model.get_decoder(), after=keep):
        model(**batch_inputs(model, batch), use_cache=False)
    if not outputs:
        raise UnsupportedModelError("the model does not call its get_decoder(); expected a causal language model")
    return Body(outputs[-1])


class Teacher(NamedTuple):
    """Another model of the same vocabulary, and the output of its backbone for the same batch."""

    model: PreTrainedModel
    body: Body


def loss_and_grad(
    model: PreTrainedModel, body: Body, batch: Tokens, teacher: Teacher | None = None, *, samples_labels: bool = False
) -> tuple[float, Tensor]:
    """The summed negative log-likelihood of a batch, and its gradient in the hidden states at the input of the head.

    The head of the model is applied with all that it does to the logits. Padding is not counted.

    Args:
        model: the model that ``body`` comes from.
        body: of the batch, by ``body_of``.
        batch: the tokens of the forward pass.
        teacher: if given, the loss is the Kullback-Leibler divergence from its distribution of each token.
        samples_labels: the gradient is that of tokens drawn from the model's own predictions; not with a teacher. Each
            sequence has draws of its own, always the same ones.

    Returns:
        The loss in nats, and the gradient, (B, L, H) in the dtype of the hidden states.
    """
    hidden = body.hidden.detach()
    draws = uniform_draws(batch).to(hidden.device) if samples_labels else None
    chosen, labels, parts = _counted(model, hidden, batch)
    source, grad = hidden[chosen], torch.zeros_like(hidden)
    expected = hidden if teacher is None else teacher.body.hidden
    grads = torch.empty_like(source)
    loss = 0.0
    for rows in parts:
        part = source[rows].requires_grad_()
        with torch.enable_grad():
            logits = _logits(model, body, part, labels[rows])
        if teacher is None:
            drawn = None if draws is None else draws[rows].to(logits.device)
            value, grad_logits = nll_and_grad(logits.detach(), labels[rows].to(logits.device), drawn)
        else:
            with torch.no_grad():
                wanted = _logits(*teacher, expected[chosen.to(expected.device)][rows], labels[rows])
            value, grad_logits = divergence_and_grad(logits.detach(), wanted.to(logits.device))
        (grads[rows],) = torch.autograd.grad([logits], [part], [grad_logits])
        loss += value
        del logits, grad_logits  # free them before the next slice
    grad[chosen] = grads
    return loss, grad


@torch.no_grad()
def loss_alone(model: PreTrainedModel, body: Body, batch: Tokens) -> float:
    """The loss of ``loss_and_grad``, without the products of its gradient."""
    chosen, labels, parts = _counted(model, body.hidden, batch)
    source = body.hidden[chosen]
    return sum(
        _nll(_log_probabilities(_logits(model, body, source[rows], labels[rows])), labels[rows]) for rows in parts
    )


@torch.no_grad()
def divergences(model: PreTrainedModel, bodies: Sequence[Body], batch: Tokens, teacher: Teacher) -> list[float]:
    """The loss of ``loss_and_grad`` with a teacher, of several outputs of the backbone for the same batch."""
    chosen, labels, parts = _counted(model, teacher.body.hidden, batch)
    totals = [0.0] * len(bodies)
    for rows in parts:
        wanted = _log_probabilities(_logits(*teacher, teacher.body.hidden[chosen][rows], labels[rows]))
        probabilities = wanted.exp()
        for index, body in enumerate(bodies):
            hidden = body.hidden[chosen.to(body.hidden.device)]
            found = _log_probabilities(_logits(model, body, hidden[rows], labels[rows]))
            totals[index] += _divergence_(found, wanted.to(found.device), probabilities.to(found.device))
    return totals


def _counted(model: PreTrainedModel, hidden: Tensor, batch: Tokens) -> tuple[Tensor, Tensor, list[slice]]:
    """Which hidden states predict a counted token, (B, L), and these tokens, (T,), with the slices to compute."""
    chosen = F.pad(batch.is_target, (0, 1)).to(hidden.device)
    labels = batch.input_ids[:, 1:][batch.is_target].to(hidden.device)
    step = slice_rows(vocabulary_size(model))
    return chosen, labels, [slice(start, start + step) for start in range(0, len(labels), step)]


def slice_rows(vocabulary: int) -> int:
    """The number of tokens whose logits are computed at once."""
    return max(LEAST_ROWS, LOGITS_BYTES // (4 * vocabulary))


def _logits(model: PreTrainedModel, body: Body, hidden: Tensor, labels: Tensor) -> Tensor:
    """What the head makes of some hidden states, (T, H): (T, vocab)."""
    output = _with_hidden(body.output, hidden[None])
    with forwarding([model.get_decoder()], lambda *_, **__: output):
        logits: Tensor = model(input_ids=labels[None].to(first_device(model)), use_cache=False).logits
    return logits[0]


@torch.no_grad()
def sum_nll(model: PreTrainedModel, batches: Iterable[Tokens]) -> float:
    """The summed negative log-likelihood of all tokens but the first of each sequence, in nats, without padding."""
    total = 0.0
    with evaluating(model):
        for batch in batches:
            total += loss_alone(model, body_of(model, batch), batch)
    return total


def mean_loss(model: PreTrainedModel, batches: Sequence[CalibrationBatch], *, processes: Processes = ALONE) -> float:
    """The mean negative log-likelihood, in nats per token, of batches that ``processes`` share."""
    total = torch.zeros(1, dtype=torch.float64)
    with processes.fail_together():
        total += sum_nll(model, processes.local_batches(batches))
    processes.sum_([total])
    return float(total) / sum(batch.num_targets for batch in batches)


def nll_and_grad(logits: Tensor, labels: Tensor, draws: Tensor | None = None) -> tuple[float, Tensor]:
    """``-Σ_t log softmax(logits)[t, labels[t]]`` and its gradient, ``softmax(logits) - onehot(labels)``.

    Autograd gives the same result, but needs two more tensors of the size of the logits.

    Args:
        logits: (T, vocab).
        labels: (T,) int64.
        draws: (T,), uniform in [0, 1): if given, the gradient is that of labels drawn with them from softmax(logits).

    Returns:
        The sum, computed in fp32 (fp64 for fp64), and the gradient, (T, vocab) in the dtype of ``logits``.
    """
    log_probabilities = _log_probabilities(logits)
    nll = _nll(log_probabilities, labels)
    grad = log_probabilities.exp_()
    if draws is not None:  # a few rows at a time, because their sums are as large
        rows = zip(grad.split(DRAWN_ROWS), draws.split(DRAWN_ROWS), strict=True)
        labels = torch.cat([drawn_labels(*of_rows) for of_rows in rows])
    grad[torch.arange(len(labels), device=labels.device), labels] -= 1
    return nll, grad.to(logits.dtype)


def drawn_labels(probabilities: Tensor, draws: Tensor) -> Tensor:
    """The labels, (T,) int64, of which each draw, (T,) in [0, 1), hits the share of its probability, (T, vocab)."""
    ends = probabilities.cumsum(-1)
    hits = torch.searchsorted(ends, draws.to(ends.dtype)[:, None] * ends[:, -1:], right=True)[:, 0]
    return hits.clamp_(max=ends.shape[-1] - 1)


def uniform_draws(batch: Tokens) -> Tensor:
    """A number in [0, 1) for each counted token; those of a sequence depend on nothing but its tokens."""
    draws = []
    for tokens, counted in zip(batch.input_ids[:, 1:].cpu(), batch.is_target.cpu(), strict=True):
        seed = zlib.crc32(tokens[counted].numpy().tobytes())
        draws.append(torch.rand(int(counted.sum()), generator=torch.Generator().manual_seed(seed)))
    return torch.cat(draws)


def _log_probabilities(logits: Tensor) -> Tensor:
    return logits.log_softmax(-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _nll(log_probabilities: Tensor, labels: Tensor) -> float:
    labels = labels.to(log_probabilities.device)
    return -log_probabilities.gather(1, labels[:, None]).sum().item()


def _divergence_(found: Tensor, wanted: Tensor, probabilities: Tensor) -> float:
    """``Σ p (log p − log q)`` of log q, log p and p; log q is overwritten. ``F.kl_div`` takes 6 to 10 times as long."""
    return -found.sub_(wanted).mul_(probabilities).sum().item()


def divergence_and_grad(logits: Tensor, wanted: Tensor) -> tuple[float, Tensor]:
    """``Σ_t KL(p_t ‖ q_t)`` with p = softmax(wanted) and q = softmax(logits), and its gradient in ``logits``, q - p.

    Args:
        logits: (T, vocab).
        wanted: (T, vocab).

    Returns:
        The sum, computed in fp32 (fp64 for fp64), and the gradient, (T, vocab) in the dtype of ``logits``.
    """
    found, wanted = map(_log_probabilities, (logits, wanted))
    probabilities = wanted.exp()
    grad = found.exp().sub_(probabilities).to(logits.dtype)
    return _divergence_(found, wanted, probabilities), grad


def _with_hidden(output: Any, hidden: Tensor) -> Any:
    """The output of a backbone with other hidden states."""
    if not isinstance(output, ModelOutput):
        return (hidden, *output[1:])
    changed = copy.copy(output)
    changed[next(iter(changed.keys()))] = hidden
    return changed
