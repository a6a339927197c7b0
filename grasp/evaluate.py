"""What a model is worth: perplexity, and tokens per second."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grasp.architecture import evaluating, first_device
from grasp.errors import CalibrationError
from grasp.progress import Progress, silent

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
    progress: Progress = silent,
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


def max_positions(model: PreTrainedModel) -> int | None:
    """How many positions the model was made for; ``None`` where its configuration sets no limit."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


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


@dataclass(frozen=True)
class GenerationTime:
    """Seconds that one prompt and the tokens generated after it took, and what its KV cache held at the end.

    Attributes:
        prefill_s: the forward pass of the prompt.
        first_token_s: from the prompt on the host to its first token there.
        steps_s: from each token on the host to the next one.
        kv_cache_bytes: keys and values of all layers and sequences.
    """

    prefill_s: float
    first_token_s: float
    steps_s: tuple[float, ...]
    kv_cache_bytes: int

    @property
    def decode_s(self) -> float:
        """All steps after the first token."""
        return sum(self.steps_s)


@dataclass(frozen=True)
class Throughput:
    """Median speed over repeats, in tokens per second over the whole batch."""

    prefill_tokens_per_s: float
    decode_tokens_per_s: float
    prompt_tokens: int
    new_tokens: int
    batch_size: int
    repeats: int


def throughput(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    repeats: int = 5,
    progress: Progress = silent,
) -> Throughput:
    """Measure prefill and decode speed: one warm-up, then the median of ``repeats``.

    To compare models fairly, interleave them: call ``time_generation`` on each in turn, and ``summarize`` at the end.

    Raises:
        ValueError: as ``time_generation``; or if ``repeats`` is smaller than 1.
    """
    if repeats < 1:
        raise ValueError(f"repeats must be at least 1, got {repeats}")
    times = []
    for done in range(repeats + 1):
        times.append(time_generation(model, prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size))
        progress("throughput", done + 1, repeats + 1)
    return summarize(times[1:], prompt_tokens=prompt_tokens, new_tokens=new_tokens, batch_size=batch_size)


def summarize(
    times: Sequence[GenerationTime], *, prompt_tokens: int, new_tokens: int, batch_size: int = 1
) -> Throughput:
    """The speed that the median times mean, prefill and decode each by itself."""
    return Throughput(
        prefill_tokens_per_s=batch_size * prompt_tokens / median(t.prefill_s for t in times),
        decode_tokens_per_s=batch_size * new_tokens / median(t.decode_s for t in times),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        batch_size=batch_size,
        repeats=len(times),
    )


@torch.inference_mode()
def time_generation(
    model: PreTrainedModel, *, prompt_tokens: int = 512, new_tokens: int = 64, batch_size: int = 1
) -> GenerationTime:
    """Time one prompt, and ``new_tokens`` greedy steps with a KV cache after it; an end-of-text token ends nothing.

    The prompt is the same random tokens for every model of one vocabulary. Every token is fetched to the host, as
    whoever streams them does. Call it once, unused, to warm up.

    Raises:
        ValueError: if a number is smaller than 1, or the model has not enough positions.
    """
    prompt = random_prompt(model, prompt_tokens, new_tokens, batch_size)
    device = first_device(model)
    with evaluating(model):
        begin = now(device)
        cache, options = _caching(model)
        token = prompt.to(device)
        start = now(device)
        logits = model(input_ids=token, **options).logits
        prefill = now(device) - start
        token = logits[:, -1:].argmax(-1)
        token.tolist()
        arrived = [time.perf_counter()]
        for _ in range(new_tokens):
            token = model(input_ids=token, **options).logits[:, -1:].argmax(-1)
            token.tolist()
            arrived.append(time.perf_counter())
    steps = tuple(after - before for before, after in pairwise(arrived))
    return GenerationTime(prefill, arrived[0] - begin, steps, _cache_bytes(cache))


@torch.inference_mode()
def first_logits(model: PreTrainedModel, *, prompt_tokens: int, batch_size: int = 1) -> Tensor:
    """Logits after the prompt of ``time_generation``, and after one more token, the same for every model: (2, B, V).

    Raises:
        ValueError: as ``time_generation``.
    """
    prompt = random_prompt(model, prompt_tokens, 1, batch_size).to(first_device(model))
    _, options = _caching(model)
    with evaluating(model):
        return torch.stack([model(input_ids=ids, **options).logits[:, -1] for ids in (prompt, prompt[:, :1])])


def random_prompt(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int) -> Tensor:
    """The prompt of ``time_generation``, (B, L) on the CPU.

    Raises:
        ValueError: as ``time_generation``.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    limit = max_positions(model) or math.inf
    if prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new ones are more than the model's {limit} positions"
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0))


def _caching(model: PreTrainedModel) -> tuple[DynamicCache, dict[str, Any]]:
    """An empty KV cache, which is filled in place, and how the model is told of it."""
    accepted = inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    options: dict[str, Any] = {"use_cache": True, "cache" if "cache" in accepted else "past_key_values": cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1  # as ``generate`` does
    return cache, options


def _cache_bytes(cache: DynamicCache) -> int:
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
