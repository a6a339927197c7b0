"""How fast a model generates."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grasp.model.running import evaluating, first_device
from grasp.model.targets import max_positions
from grasp.progress import Progress, no_progress


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
    progress: Progress = no_progress,
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
