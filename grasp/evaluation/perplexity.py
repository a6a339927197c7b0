"""Measures the perplexity of a model on a text."""

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

_LOSS_ROWS = 256  # positions whose logits are converted to fp32 at a time


@dataclass(frozen=True)
class PerplexityResult:
    """The perplexity of a text and how it was measured.

    Attributes:
        perplexity: ``exp(nll)``; NaN or infinite if the loss of any token is.
        nll: mean negative log-likelihood, in nats per scored token.
        tokens: number of scored tokens.
        windows: number of windows.
        nonfinite: number of tokens with a NaN or infinite loss; they count as scored.
        window: positions per window, BOS included.
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
    """Tokens ``begin`` to ``end`` of a text; the tokens from ``scored`` on are predicted."""

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
    """Compute the token-weighted perplexity of a causal language model on a text.

    The text is cut into windows. A window scores the tokens that no earlier window has scored and that have a token
    before them. Without BOS the first token of the text is never scored; if windows do not overlap, neither is the
    first token of any window.

    Args:
        model: a causal language model, on any device.
        token_ids: (T,) or (1, T), without special tokens.
        window: positions per window, BOS included; at most the positions of the model are used.
        stride: new tokens per window; ``None`` for windows that do not overlap.
        batch_size: windows per forward pass. There is no padding: the last, shorter window is a batch of its own.
        bos_token_id: put before each window as context; see ``grasp.calibration.bos_for``.
        progress: called after each forward pass.

    Raises:
        CalibrationError: if the text is too short to score a token.
        ValueError: if ``window``, ``stride`` or ``batch_size`` is impossible, or the tokens are no row of integers.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1, vocab_size=99, bos_token_id=0, eos_token_id=0))
        >>> result = perplexity(model, range(50), window=16)
        >>> result.windows, result.tokens
        (4, 46)
    """
    tokens = _row(token_ids)
    prefix = tokens.new_tensor([] if bos_token_id is None else [bos_token_id])
    window = min(window, max_positions(model) or window)
    room = window - len(prefix)
    stride = room if stride is None else stride
    _check_sizes(window, room, stride, batch_size)
    windows = cut_windows(len(tokens), room, stride, first_needs_context=bos_token_id is None)
    if len(tokens) < 2 or not windows:
        raise CalibrationError(f"the text has {len(tokens)} tokens; perplexity needs at least 2. Use a longer text.")

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


def _check_sizes(window: int, room: int, stride: int, batch_size: int) -> None:
    if window < 2:
        raise ValueError(f"window must be at least 2 positions, got {window}")
    if not 1 <= stride <= room:
        raise ValueError(f"stride must be between 1 and the {room} tokens of a window, or None; got {stride}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")


def cut_windows(length: int, room: int, stride: int, *, first_needs_context: bool) -> list[Window]:
    """Cut ``length`` tokens into windows of ``room`` tokens that begin every ``stride`` tokens.

    The last window may be shorter. Windows that score no token are left out.

    Args:
        first_needs_context: the first token of a window is not scored, because it has no token before it.
    """
    windows: list[Window] = []
    known = 0  # tokens before this one are scored or cannot be scored
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
    """Return token ids as int64 (T,) on the CPU."""
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


@torch.no_grad()  # inference mode would turn weights that accelerate loads into inference tensors
def _losses(model: PreTrainedModel, rows: Tensor, scored_from: Sequence[int]) -> Tensor:
    """Return the losses in nats of the tokens from ``scored_from`` on of each row (B, L), 1-D fp32 on the CPU."""
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
