"""What a model is worth: perplexity, and tokens per second."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.errors import CalibrationError
from grasp.model.running import evaluating, first_device
from grasp.model.targets import max_positions
from grasp.progress import Progress, no_progress

_LOSS_ROWS = 256  # logits are taken to fp32 for this many positions at a time


@dataclass(frozen=True)
class PerplexityResult:
    """How well a model predicts a text.

    Attributes:
        perplexity: ``exp(nll)``; NaN or infinite if the loss of any token is.
        nll: mean negative log-likelihood, in nats per scored token.
        tokens: how many tokens were scored.
        windows: how many windows the text was cut into.
        nonfinite: how many tokens have a NaN or infinite loss; they are counted, never dropped.
        window: positions that the model saw at once, BOS included.
        stride: new tokens per window.
    """

    perplexity: float
    nll: float
    tokens: int
    windows: int
    nonfinite: int
    window: int
    stride: int


class Window(NamedTuple):
    """Tokens ``begin`` to ``end`` of a text, of which those from ``scored`` on are predicted."""

    begin: int
    scored: int
    end: int


def perplexity(
    model: PreTrainedModel,
    token_ids: Tensor | Sequence[int],
    *,
    window: int = 1024,
    stride: int | None = None,
    batch_size: int = 1,
    bos_token_id: int | None = None,
    progress: Progress = no_progress,
) -> PerplexityResult:
    """Token-weighted perplexity of a causal language model on a text.

    The text is cut into windows. Each scores those tokens that no earlier one has and that have a token before them: so
    without BOS the first token of the text is never scored, nor, where windows do not overlap, the first of any window.

    Args:
        model: a causal language model, on any device.
        token_ids: (T,) or (1, T), without special tokens.
        window: positions that the model sees at once, BOS included; no more than it has are used.
        stride: new tokens per window; ``None`` for as many as fit, so that windows do not overlap.
        batch_size: windows per forward pass. No padding is used: the last, shorter window goes alone.
        bos_token_id: put before each window, as context only; see ``grasp.calibration.bos_for``.
        progress: called after each forward pass.

    Raises:
        CalibrationError: if the text is too short to score a token.
        ValueError: if ``window``, ``stride`` or ``batch_size`` is impossible, or the tokens are no row of integers.
    """
    tokens = _row(token_ids)
    prefix = tokens.new_tensor([] if bos_token_id is None else [bos_token_id])
    window = min(window, max_positions(model) or window)
    room = window - len(prefix)
    if window < 2:
        raise ValueError(f"window must be at least 2 positions, got {window}")
    stride = room if stride is None else stride
    if not 1 <= stride <= room:
        raise ValueError(f"stride must be between 1 and the {room} tokens of a window, or None; got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    windows = cut_windows(len(tokens), room, stride, first_needs_context=bos_token_id is None)
    if len(tokens) < 2 or not windows:
        raise CalibrationError(f"the text has {len(tokens)} tokens; perplexity needs at least 2. Give a longer text.")

    total = torch.zeros((), dtype=torch.float64)
    scored = nonfinite = done = 0
    with evaluating(model):
        for batch in _equal_batches(windows, batch_size):
            rows = torch.stack([torch.cat([prefix, tokens[w.begin : w.end]]) for w in batch])
            loss = _losses(model, rows, [len(prefix) + w.scored - w.begin for w in batch])
            total += loss.double().sum()
            scored += loss.numel()
            nonfinite += int((~torch.isfinite(loss)).sum())
            done += len(batch)
            progress("perplexity", done, len(windows))
    nll = total / scored
    return PerplexityResult(nll.exp().item(), nll.item(), scored, len(windows), nonfinite, window, stride)


def cut_windows(length: int, room: int, stride: int, *, first_needs_context: bool) -> list[Window]:
    """Cut ``length`` tokens into windows of ``room``, each ``stride`` after the one before, the last one shorter.

    Windows that would score nothing are left out. All but the last are equally long.

    Args:
        first_needs_context: whether the first token of a window cannot be predicted, there being nothing before it.
    """
    windows: list[Window] = []
    known = 0  # tokens before this one are scored, or never will be
    for begin in range(0, length, stride):
        end = min(begin + room, length)
        scored = max(known, begin + first_needs_context)
        if scored < end:
            windows.append(Window(begin, scored, end))
        known = end
        if end == length:
            break
    return windows


def _row(token_ids: Tensor | Sequence[int]) -> Tensor:
    """Token ids as int64 (T,) on the CPU."""
    tokens = torch.as_tensor(token_ids)
    if tokens.numel() and (tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool):
        raise ValueError(f"token ids must be integers, got {tokens.dtype}")
    if tokens.ndim not in (1, 2) or (tokens.ndim == 2 and len(tokens) != 1):
        raise ValueError(f"token ids must be one text of the shape (T,) or (1, T), got {tuple(tokens.shape)}")
    return tokens.flatten().to("cpu", torch.int64)


def _equal_batches(windows: Sequence[Window], batch_size: int) -> Iterator[list[Window]]:
    for _, group in groupby(windows, key=lambda w: w.end - w.begin):
        while batch := list(islice(group, batch_size)):
            yield batch


@torch.no_grad()  # inference mode would leave its mark on weights that accelerate fetches
def _losses(model: PreTrainedModel, rows: Tensor, scored_from: Sequence[int]) -> Tensor:
    """Losses in nats of the tokens of each row from the given position on: (B, L) → 1-D fp32, on the CPU."""
    logits = model(input_ids=rows.to(first_device(model)), use_cache=False).logits
    losses = []
    for row, row_logits, first in zip(rows, logits, scored_from, strict=True):
        targets = row[first:].to(logits.device).split(_LOSS_ROWS)
        predictions = row_logits[first - 1 : -1].split(_LOSS_ROWS)
        losses += [
            torch.nn.functional.cross_entropy(prediction.float(), target, reduction="none")
            for prediction, target in zip(predictions, targets, strict=True)
        ]
    return torch.cat(losses).cpu()
