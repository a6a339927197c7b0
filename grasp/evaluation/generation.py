"""Measures how fast a model generates."""

from __future__ import annotations

import inspect
import math
import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from grasp.model.running import evaluating, first_device
from grasp.model.targets import max_positions


@dataclass(frozen=True)
class GenerationTime:
    """Times of one prompt and the tokens generated after it, in seconds, and the final size of the KV cache.

    Attributes:
        prefill_s: time of the forward pass of the prompt.
        first_token_s: time from the prompt on the host to the first token on the host.
        steps_s: times from each token on the host to the next.
        kv_cache_bytes: size of the keys and values of all layers and sequences.
    """

    prefill_s: float
    first_token_s: float
    steps_s: tuple[float, ...]
    kv_cache_bytes: int

    @property
    def decode_s(self) -> float:
        """Time of all steps after the first token."""
        return sum(self.steps_s)


@torch.inference_mode()
def time_generation(
    model: PreTrainedModel, *, prompt_tokens: int = 512, new_tokens: int = 64, batch_size: int = 1
) -> GenerationTime:
    """Time one prompt and ``new_tokens`` greedy steps with a KV cache. An end-of-text token does not stop it.

    The prompt has random tokens, the same for all models of one vocabulary size. Every token is copied to the host, as
    in streaming. The first call warms up: discard its result.

    Raises:
        ValueError: if a number is smaller than 1, or the model has too few positions.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1))
        >>> time = time_generation(model, prompt_tokens=4, new_tokens=2)
        >>> len(time.steps_s), time.kv_cache_bytes  # bytes: 6 tokens x 12 features x keys and values x fp32
        (2, 576)
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
    """Return the logits after the prompt of ``time_generation`` and after its first token again, (2, B, V).

    Raises:
        ValueError: as ``time_generation``.
    """
    prompt = random_prompt(model, prompt_tokens, 1, batch_size).to(first_device(model))
    _, options = _caching(model)
    with evaluating(model):
        return torch.stack([model(input_ids=ids, **options).logits[:, -1] for ids in (prompt, prompt[:, :1])])


def random_prompt(model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int) -> Tensor:
    """Return the prompt of ``time_generation``, (B, L) on the CPU.

    Raises:
        ValueError: as ``time_generation``.
    """
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    limit = max_positions(model) or math.inf
    if prompt_tokens + new_tokens > limit:
        raise ValueError(
            f"{prompt_tokens} prompt tokens and {new_tokens} new tokens are more than the model's {limit} positions"
        )
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    return torch.randint(vocabulary, (batch_size, prompt_tokens), generator=torch.Generator().manual_seed(0))


def _caching(model: PreTrainedModel) -> tuple[DynamicCache, dict[str, Any]]:
    """Return an empty KV cache, which the model fills in place, and the model's arguments that use it."""
    accepted = inspect.signature(model.forward).parameters
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    options: dict[str, Any] = {"use_cache": True, "cache" if "cache" in accepted else "past_key_values": cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1  # as in ``generate``
    return cache, options


def _cache_bytes(cache: DynamicCache) -> int:
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def now(device: torch.device) -> float:
    """Return the time in seconds after the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
