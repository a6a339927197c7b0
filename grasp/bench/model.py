"""Time a whole model: dense, with layers removed, and low-rank with each backend and unfused.

The low-rank layers are a compressed checkpoint's, or by plain SVD at GRASP's ranks: speed depends on shapes alone.
A low-rank model is timed only where its logits are those of the reference backend, at the very batch and prompt.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from statistics import quantiles

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.memory import peak_bytes_above_now
from grasp.bench.providers import (
    COMPRESSED,
    DENSE,
    REMOVED,
    Provider,
    low_rank_layers,
    objections,
    pick_layers,
    providers,
    require_backends,
    truncate_,
)
from grasp.bench.records import PLAIN_SVD, ModelResult, NotMeasured, Percentiles
from grasp.bench.timing import Sample
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, read_text, tokenize
from grasp.evaluation.generation import GenerationTime, first_logits, random_prompt, time_generation
from grasp.evaluation.perplexity import PerplexityResult, perplexity
from grasp.loading import load_quietly
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import first_device
from grasp.model.size import model_size
from grasp.model.targets import decoder
from grasp.progress import Progress, no_progress
from grasp_kernels.roofline import Card

REFERENCE = "reference"
# Relative difference of the logits, norm-wise, between two ways to compute low-rank layers that rounding may make.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NOTE = "Factors by plain SVD: the speed is that of GRASP at these ranks, the perplexity is not."
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class Request:
    """What is to be measured.

    Attributes:
        model: the dense one, as ``load_model`` takes it.
        checkpoint: the same compressed, as ``load_model`` takes it; ``None`` for plain SVD, of the layers below.
        layers: that become low-rank; ``None`` for ``num_layers`` in the middle.
        num_layers: how many.
        retain_ratio: parameters kept of each of their matrices.
        batch_sizes: sequences at a time.
        prompt_tokens: of each sequence.
        new_tokens: decoding steps.
        repeats: times that every model gets its turn.
        backends: of the dispatch table, to run all low-rank layers on; all that can if empty.
        text: what the perplexity is of, as ``read_text`` takes it.
        window: tokens that a model sees at once there.
        windows: how many of them; 0 for no perplexity.
        dtype: as ``load_model`` takes it.
        device: likewise.
        threads: of the CPU; ``None`` for PyTorch's choice.
    """

    model: str = BUILTIN
    checkpoint: str | None = None
    layers: tuple[int, ...] | None = None
    num_layers: int = 6
    retain_ratio: float = 0.1
    batch_sizes: Sequence[int] = (1, 4, 16)
    prompt_tokens: int = 128
    new_tokens: int = 16
    repeats: int = 5
    backends: Sequence[str] = ()
    text: str = BUILTIN
    window: int = 512
    windows: int = 16
    dtype: str = "auto"
    device: str | None = None
    threads: int | None = None


def difference(got: Tensor, expected: Tensor) -> float:
    """How far logits (steps, B, V) are apart, norm-wise and relative to the second's; that of the worst step."""
    apart = torch.linalg.vector_norm((got.double() - expected.double()).flatten(1), dim=1)
    return float((apart / torch.linalg.vector_norm(expected.double().flatten(1), dim=1)).max())


def take_turns(
    models: Mapping[str, Provider], request: Request, batch_size: int, progress: Progress = no_progress
) -> dict[str, tuple[list[GenerationTime], int | None]]:
    """Times of each, in turn, each repetition starting with another, and the memory of the one that warms up."""
    names = list(models)
    peaks: dict[str, int | None] = {}
    times: dict[str, list[GenerationTime]] = {name: [] for name in names}
    sizes = {"prompt_tokens": request.prompt_tokens, "new_tokens": request.new_tokens, "batch_size": batch_size}
    step = f"timing batch {batch_size}"
    progress(step, 0, 1)  # not at every turn: a bar that moves takes time from what is timed
    for repetition in range(request.repeats + 1):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            generate = partial(time_generation, models[name].prepared(), **sizes)
            if repetition:
                times[name].append(generate())
            else:
                peaks[name] = peak_bytes_above_now(generate, first_device(models[name].model))
    progress(step, 1, 1)
    return {name: (each, peaks[name]) for name, each in times.items()}


def floors(
    model: PreTrainedModel, card: Card, batch_size: int, prompt_tokens: int, cache_bytes: int
) -> tuple[float, ...]:
    """Seconds that prefill and a decoding step take at least: matrix products and what they read, no attention.

    Empty where a token does not go through all of the model: with experts.

    Args:
        cache_bytes: of the KV cache that a step reads.
    """
    config = model.config.get_text_config(decoder=True)
    if any(getattr(config, name, None) for name in _EXPERTS):
        return ()
    kinds = (nn.Linear, Conv1D, LowRankLinear)
    read = list(chain.from_iterable(m.parameters(recurse=False) for m in model.modules() if isinstance(m, kinds)))
    head = model.get_output_embeddings()
    parameters, size = sum(p.numel() for p in read), sum(p.numel() * p.element_size() for p in read)
    once = sum(p.numel() for p in head.parameters()) if isinstance(head, nn.Module) else 0
    prefill = 2 * batch_size * ((parameters - once) * prompt_tokens + once)
    return (
        max(size / card.bandwidth, prefill / card.flops),
        max((size + cache_bytes) / card.bandwidth, 2 * batch_size * parameters / card.flops),
    )


def percentiles(seconds: Sequence[float]) -> Percentiles:
    """In milliseconds."""
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds] * 99
    return Percentiles(*(1e3 * cuts[percent - 1] for percent in (50, 95, 99)))


def run(request: Request, *, progress: Progress = no_progress) -> Iterator[list[ModelResult | NotMeasured]]:
    """Measure one batch size after the other.

    Raises:
        GraspError, ValueError: as ``load_model``, ``read_text``, ``pick_layers``, ``low_rank_layers``, ``truncate_``,
            ``perplexity`` and ``time_generation`` do.
    """
    require_backends(request.backends)
    if request.repeats < 1 or request.windows < 0:
        raise ValueError(f"at least 1 repeat and 0 windows are needed, got {request.repeats} and {request.windows}")
    text = read_text(request.text, split="evaluation") if request.windows else None
    before = torch.get_num_threads()
    torch.set_num_threads(request.threads or before)
    try:
        yield from _run(request, text, progress)
    finally:
        torch.set_num_threads(before)


def _run(request: Request, text: str | None, progress: Progress) -> Iterator[list[ModelResult | NotMeasured]]:
    dense, tokenizer = load_quietly(request.model, dtype=request.dtype, device=request.device, progress=progress)
    for batch_size in request.batch_sizes:
        random_prompt(dense, request.prompt_tokens, request.new_tokens, batch_size)  # raises where it is impossible
    compressed, layers, ratio = _compressed(dense, request, progress)
    found, left_out = providers(dense, compressed, layers, request.backends)
    quality = {} if text is None else _perplexities(found, tokenizer, text, request, progress)
    device = first_device(dense)
    card = measure_card(device, dense.dtype)
    bench = _Bench(request, card, conditions(card, device), tuple(layers), ratio, quality)
    for batch_size in request.batch_sizes:
        records = bench.measure(found, batch_size, progress)
        yield [*(bench.left_out(name, batch_size, reason) for name, reason in left_out.items()), *records]


def _compressed(
    dense: PreTrainedModel, request: Request, progress: Progress
) -> tuple[PreTrainedModel, list[int], float]:
    """The low-rank model, its low-rank layers, and the share of their parameters that they keep."""
    if request.checkpoint is None:
        chosen = pick_layers(request.layers, request.num_layers, len(decoder(dense).layers))
        compressed = copy.deepcopy(dense)
        truncate_(compressed, chosen, request.retain_ratio, progress=progress)
        return compressed, *low_rank_layers(dense, compressed, request.model)
    dtype = str(dense.dtype).removeprefix("torch.")
    compressed, _ = load_quietly(request.checkpoint, dtype=dtype, device=request.device, progress=progress)
    return compressed, *low_rank_layers(dense, compressed, request.checkpoint)


def _perplexities(
    models: Mapping[str, Provider], tokenizer: PreTrainedTokenizerBase, text: str, request: Request, progress: Progress
) -> dict[str, PerplexityResult]:
    """Of each set of weights once: backends and the unfused form compute the same function."""
    bos = bos_for(tokenizer)
    tokens = tokenize(tokenizer, text)[: request.windows * (request.window - (bos is not None))]
    measured: dict[str, PerplexityResult] = {}
    for name in (DENSE, REMOVED, COMPRESSED):
        if name in models:
            measured[name] = perplexity(
                *(models[name].prepared(), tokens),
                window=request.window,
                bos_token_id=bos,
                progress=partial(_named, progress, name),
            )
    return {name: measured[name if name in measured else COMPRESSED] for name in models}


def _named(progress: Progress, name: str, step: str, done: int, total: int) -> None:
    progress(f"{step} {name}", done, total)


@dataclass(frozen=True)
class _Bench:
    """What all batch sizes share."""

    request: Request
    card: Card
    now: Conditions
    layers: tuple[int, ...]
    retain_ratio: float
    quality: Mapping[str, PerplexityResult]

    def left_out(self, provider: str, batch_size: int, reason: str, *, wrong: bool = False) -> NotMeasured:
        return NotMeasured("model", provider, reason, wrong, model=self.request.model, batch_size=batch_size)

    def measure(
        self, models: Mapping[str, Provider], batch_size: int, progress: Progress
    ) -> list[ModelResult | NotMeasured]:
        """Check all models at a batch size, then time those that are right."""
        records: list[ModelResult | NotMeasured] = []
        rows = (batch_size * self.request.prompt_tokens, batch_size)
        able: dict[str, Provider] = {}
        for name, provider in models.items():
            if (reason := objections(provider, rows)) is not None:
                records.append(self.left_out(name, batch_size, reason))
            else:
                able[name] = provider
        apart = self._differences(able, batch_size, progress)
        tolerance = TOLERANCE[able[DENSE].model.dtype]
        for name, value in apart.items():
            if not value <= tolerance:
                del able[name]
                reason = f"logits differ from the reference backend's by {value:.1e}, at most {tolerance:.0e} allowed"
                records.append(self.left_out(name, batch_size, reason, wrong=True))
        for name, result in self.quality.items():
            if name in able and not math.isfinite(result.perplexity):
                reason = f"perplexity: {result.nonfinite} of {result.tokens} tokens have a loss that is not finite"
                records.append(self.left_out(name, batch_size, reason))
        turns = take_turns(able, self.request, batch_size, progress)
        dense = [Sample(tuple(seconds)) for seconds in _phases(turns[DENSE][0])]
        for name, (times, peak) in turns.items():
            records.append(self._result(name, able[name], batch_size, times, peak, dense, apart.get(name)))
        return records

    def _differences(self, models: Mapping[str, Provider], batch_size: int, progress: Progress) -> dict[str, float]:
        """Of the logits of every low-rank model from those of the same weights on the reference backend."""
        sizes = {"prompt_tokens": self.request.prompt_tokens, "batch_size": batch_size}
        low_rank = [name for name in models if name not in (DENSE, REMOVED)]
        expected = first_logits(Provider(models[COMPRESSED].model, REFERENCE).prepared(), **sizes)
        found = {}
        for done, name in enumerate(low_rank, start=1):
            found[name] = difference(first_logits(models[name].prepared(), **sizes), expected)
            progress(f"checking batch {batch_size}", done, len(low_rank))
        return found

    def _result(
        self,
        name: str,
        provider: Provider,
        batch_size: int,
        times: Sequence[GenerationTime],
        peak: int | None,
        dense: Sequence[Sample],
        apart: float | None,
    ) -> ModelResult:
        request, model = self.request, provider.model
        size, cache = model_size(model, decoder(model).layers), times[-1].kv_cache_bytes
        prefill, decode = (Sample(tuple(seconds)) for seconds in _phases(times))
        steps = percentiles([step for each in times for step in each.steps_s])
        share = request.prompt_tokens / (request.prompt_tokens + request.new_tokens)
        least = floors(model, self.card, batch_size, request.prompt_tokens, int(cache * share))
        limits: Sequence[float | None] = [1e3 * seconds for seconds in least] or [None, None]
        first, whole = percentiles([each.first_token_s for each in times]), percentiles(prefill.seconds)
        quality = self.quality.get(name)
        finite = quality is not None and math.isfinite(quality.perplexity)
        return ModelResult(
            model=request.model,
            provider=name,
            backend=provider.backend,
            factors=PLAIN_SVD if request.checkpoint is None else Path(request.checkpoint).name,
            dtype=str(model.dtype).removeprefix("torch."),
            layers=self.layers,
            retain_ratio=self.retain_ratio,
            batch_size=batch_size,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            repeats=request.repeats,
            parameters=size.parameters,
            weight_bytes=size.bytes,
            kv_cache_bytes=cache,
            peak_memory_bytes=peak,
            prefill_ms=whole,
            first_token_ms=first,
            inter_token_ms=steps,
            prefill_floor_ms=limits[0],
            inter_token_floor_ms=limits[1],
            prefill_share_of_floor=None if limits[0] is None else limits[0] / whole.p50,
            inter_token_share_of_floor=None if limits[1] is None else limits[1] / steps.p50,
            prefill_tokens_per_s=batch_size * request.prompt_tokens / prefill.median,
            prefill_spread=prefill.spread,
            prefill_speedup_over_dense=prefill.speedup_over(dense[0]),
            decode_tokens_per_s=batch_size * request.new_tokens / decode.median,
            decode_spread=decode.spread,
            decode_speedup_over_dense=decode.speedup_over(dense[1]),
            logits_difference=apart,
            perplexity=quality.perplexity if quality is not None and finite else None,
            perplexity_text=None if quality is None else Path(request.text).name,
            perplexity_tokens=None if quality is None else quality.tokens,
            note=NOTE if request.checkpoint is None else "",
            conditions=self.now,
        )


def _phases(times: Sequence[GenerationTime]) -> tuple[list[float], list[float]]:
    return [each.prefill_s for each in times], [each.decode_s for each in times]
