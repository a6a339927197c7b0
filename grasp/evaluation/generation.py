"""Measures how fast a model generates."""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from grasp.model.running import evaluating, first_device
from grasp.model.targets import max_positions, vocabulary_size


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


class CompiledSteps:
    """The decoding steps of a model as one graph of ``torch.compile``, with CUDA graphs on a GPU, over a static cache.

    Prompts are not compiled, as in ``generate``. A cache is used again by later calls of the same sizes, since a graph
    is tied to its memory. A step guards its inputs and not the thousands of attributes of the model's modules, which
    took a tenth of the time of a small model. So the model must not change after its first step.

    Args:
        model: with an attention that ``torch.compile`` can trace.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> steps = CompiledSteps(GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1)))  # the first step compiles
        >>> steps.cache(batch_size=1, positions=6) is steps.cache(batch_size=1, positions=6)
        True
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self._config = model.config.get_text_config(decoder=True)
        options: dict[str, Any] = {
            "guard_filter_fn": torch.compiler.skip_guard_on_all_nn_modules_unsafe,
            **({"triton.cudagraphs": True} if first_device(model).type == "cuda" else {}),
        }
        self.step = torch.compile(_with_code_of_its_own(model), fullgraph=True, options=options)
        self._caches: dict[tuple[int, int], StaticCache] = {}

    def cache(self, batch_size: int, positions: int) -> StaticCache:
        """The empty cache of these sizes."""
        key = batch_size, positions
        if key in self._caches:
            self._caches[key].reset()
        else:
            self._caches[key] = StaticCache(config=self._config, max_cache_len=positions)
        return self._caches[key]


def _with_code_of_its_own(model: PreTrainedModel) -> Callable[..., Any]:
    """The model as a function. torch.compile looks for graphs by code; without guards it would take another model's."""

    def step(**inputs: Any) -> Any:
        return model(**inputs)

    return FunctionType(step.__code__.replace(), step.__globals__, step.__name__, None, step.__closure__)


@torch.inference_mode()
def time_generation(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 64,
    batch_size: int = 1,
    depth: int = 0,
    compiled: CompiledSteps | None = None,
) -> GenerationTime:
    """Time one prompt and ``new_tokens`` greedy steps with a KV cache. An end-of-text token does not stop it.

    The prompt has random tokens, the same for all models of one vocabulary size. Every token is copied to the host, as
    in streaming. The first call warms up: discard its result.

    Args:
        model: the model.
        prompt_tokens: length of the prompt.
        new_tokens: number of steps after the first token.
        batch_size: number of sequences.
        depth: number of tokens before the prompt, which are in the cache when the time begins.
        compiled: the steps of the model, to be run in place of the model itself.

    Raises:
        ValueError: if a number is smaller than 1, ``depth`` than 0, or the model has too few positions.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(n_embd=12, n_layer=1))
        >>> time = time_generation(model, prompt_tokens=4, new_tokens=2)
        >>> len(time.steps_s), time.kv_cache_bytes  # bytes: 6 tokens x 12 features x keys and values x fp32
        (2, 576)
    """
    tokens = random_prompt(model, prompt_tokens, new_tokens, batch_size, depth)
    before, prompt = tokens[:, :depth], tokens[:, depth:]
    device = first_device(model)
    step = model if compiled is None else compiled.step
    with evaluating(model):
        cache, options = _caching(model, compiled, batch_size, tokens.shape[1] + new_tokens)
        if depth:
            model(input_ids=before.to(device), **options)
        begin = now(device)
        token = prompt.to(device)
        start = now(device)
        logits = model(input_ids=token, **options).logits
        prefill = now(device) - start
        token = logits[:, -1:].argmax(-1)
        token.tolist()
        arrived = [time.perf_counter()]
        for _ in range(new_tokens):
            token = step(input_ids=token, **options).logits[:, -1:].argmax(-1)
            token.tolist()
            arrived.append(time.perf_counter())
    steps = tuple(after - before for before, after in pairwise(arrived))
    return GenerationTime(prefill, arrived[0] - begin, steps, _cache_bytes(cache))


@torch.inference_mode()
def first_logits(
    model: PreTrainedModel,
    *,
    prompt_tokens: int,
    new_tokens: int = 1,
    batch_size: int = 1,
    depth: int = 0,
    compiled: CompiledSteps | None = None,
) -> Tensor:
    """Return the logits after the prompt of ``time_generation`` and after its first token again, (2, B, V).

    Arguments and errors: see ``time_generation``.
    """
    tokens = random_prompt(model, prompt_tokens, new_tokens, batch_size, depth).to(first_device(model))
    _, options = _caching(model, compiled, batch_size, tokens.shape[1] + new_tokens)
    step = model if compiled is None else compiled.step
    with evaluating(model):
        first = model(input_ids=tokens, **options).logits[:, -1]
        return torch.stack([first, step(input_ids=tokens[:, depth : depth + 1], **options).logits[:, -1]])


def random_prompt(
    model: PreTrainedModel, prompt_tokens: int, new_tokens: int, batch_size: int, depth: int = 0
) -> Tensor:
    """Return the tokens of ``time_generation`` before and in its prompt, (B, depth + L) on the CPU.

    Raises:
        ValueError: as ``time_generation``.
    """
    if depth < 0:
        raise ValueError(f"depth must be at least 0, got {depth}")
    for name, value in (("prompt_tokens", prompt_tokens), ("new_tokens", new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    limit = max_positions(model) or math.inf
    if depth + prompt_tokens + new_tokens > limit:
        deep = f"a depth of {depth}, " * (depth > 0)
        raise ValueError(
            f"{deep}{prompt_tokens} prompt tokens and {new_tokens} new tokens are more than the model's {limit} "
            "positions"
        )
    shape = batch_size, depth + prompt_tokens
    return torch.randint(vocabulary_size(model), shape, generator=torch.Generator().manual_seed(0))


def _caching(
    model: PreTrainedModel, compiled: CompiledSteps | None, batch_size: int, positions: int
) -> tuple[Cache, dict[str, Any]]:
    """Return an empty KV cache, which the model fills in place, and the model's arguments that use it."""
    accepted = inspect.signature(model.forward).parameters
    if compiled is None:
        cache: Cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    else:
        cache = compiled.cache(batch_size, positions)
    options: dict[str, Any] = {"use_cache": True, "cache" if "cache" in accepted else "past_key_values": cache}
    if "logits_to_keep" in accepted:
        options["logits_to_keep"] = 1  # as in ``generate``
    return cache, options


def _cache_bytes(cache: Cache) -> int:
    tensors = (getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values"))
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def now(device: torch.device) -> float:
    """Return the time in seconds after the device has finished all its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()
