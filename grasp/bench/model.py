"""Time a whole model: dense, with layers removed, low-rank on each backend, and low-rank unfused.

The low-rank layers come from a compressed checkpoint, or from plain SVD at GRASP's ranks: speed depends on shapes
alone. A low-rank model is timed only if its logits for the same batch and prompt equal those of the reference backend.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
    ModelProvider,
    low_rank_layers,
    objections,
    pick_layers,
    providers,
    require_backends,
    truncate_,
)
from grasp.bench.records import PLAIN_SVD, ModelResult, NotMeasured, Percentiles
from grasp.bench.timing import Sample, turns
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, read_pieces, tokenize
from grasp.evaluation.generation import GenerationTime, first_logits, random_prompt, time_generation
from grasp.evaluation.perplexity import PerplexityResult, perplexity
from grasp.loading import load_quietly
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import first_device
from grasp.model.size import model_size
from grasp.model.targets import decoder
from grasp.progress import Progress, named, no_progress
from grasp_kernels.roofline import Card
from speedgate.timing import using_threads

REFERENCE = "reference"
# Largest norm-wise relative difference of logits that rounding explains, between two backends of the same weights.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}
NOTE = "Factors by plain SVD: GRASP at these ranks has the same speed, but not this perplexity."
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")


@dataclass(frozen=True)
class ModelRequest:
    """Settings of one run.

    Attributes:
        model: the dense model, as for ``load_model``.
        checkpoint: the compressed model, as for ``load_model``; ``None`` for plain SVD of the layers below.
        layers: layers to make low-rank; ``None`` for ``num_layers`` in the middle.
        num_layers: number of low-rank layers.
        retain_ratio: fraction of each matrix's parameters that its factors have.
        batch_sizes: numbers of sequences per batch.
        prompt_tokens: prompt length.
        new_tokens: decoding steps.
        repeats: turns of every model.
        backends: names in the dispatch table; all if empty.
        text: text of the perplexity, as for ``read_pieces``.
        window: tokens per window of the text.
        windows: number of windows; 0 for no perplexity.
        dtype: as for ``load_model``.
        device: as for ``load_model``.
        threads: CPU threads; ``None`` for PyTorch's choice.
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
    """Norm-wise relative difference of logits (steps, B, V) in the worst step."""
    apart = torch.linalg.vector_norm((got.double() - expected.double()).flatten(1), dim=1)
    return float((apart / torch.linalg.vector_norm(expected.double().flatten(1), dim=1)).max())


def time_models(
    models: Mapping[str, ModelProvider], request: ModelRequest, batch_size: int, progress: Progress = no_progress
) -> dict[str, tuple[list[GenerationTime], int | None]]:
    """Generation times of all models in turns, and the peak memory of the first repetition, which warms up."""
    peaks: dict[str, int | None] = {}
    times: dict[str, list[GenerationTime]] = {name: [] for name in models}
    sizes = {"prompt_tokens": request.prompt_tokens, "new_tokens": request.new_tokens, "batch_size": batch_size}
    step = f"timing batch {batch_size}"
    progress(step, 0, 1)  # not at every turn: a moving bar would slow down the timed model
    for repetition, name in turns(list(models), request.repeats + 1):
        generate = partial(time_generation, models[name].prepared(), **sizes)
        if repetition:
            times[name].append(generate())
        else:
            peaks[name] = peak_bytes_above_now(generate, first_device(models[name].model))
    progress(step, 1, 1)
    return {name: (generations, peaks[name]) for name, generations in times.items()}


def floors(
    model: PreTrainedModel, card: Card, batch_size: int, prompt_tokens: int, cache_bytes: int
) -> tuple[float, ...]:
    """Least seconds of the prefill and of a decoding step: matrix products and the bytes they read, without attention.

    Empty for a mixture of experts, where a token does not use the whole model.

    Args:
        model: the timed model.
        card: measured speeds of the device.
        batch_size: sequences per batch.
        prompt_tokens: prompt length.
        cache_bytes: bytes of the KV cache that a step reads.
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
    """Percentiles in milliseconds, of seconds."""
    cuts = quantiles(seconds, n=100, method="inclusive") if len(seconds) > 1 else [*seconds] * 99
    return Percentiles(*(1e3 * cuts[percent - 1] for percent in (50, 95, 99)))


def run(request: ModelRequest, *, progress: Progress = no_progress) -> Iterator[list[ModelResult | NotMeasured]]:
    """Measure the batch sizes one after the other.

    Raises:
        GraspError, ValueError: from ``load_model``, ``read_pieces``, ``pick_layers``, ``low_rank_layers``,
            ``truncate_``, ``perplexity`` and ``time_generation``.
    """
    require_backends(request.backends)
    if request.repeats < 1 or request.windows < 0:
        raise ValueError(
            f"repeats must be at least 1 and windows at least 0, got {request.repeats} and {request.windows}"
        )
    text = read_pieces(request.text, split="evaluation") if request.windows else None
    with using_threads(request.threads):
        yield from _run(request, text, progress)


def _run(
    request: ModelRequest, text: Iterable[str] | None, progress: Progress
) -> Iterator[list[ModelResult | NotMeasured]]:
    dense, tokenizer = load_quietly(request.model, dtype=request.dtype, device=request.device, progress=progress)
    for batch_size in request.batch_sizes:
        random_prompt(dense, request.prompt_tokens, request.new_tokens, batch_size)  # raises if it is impossible
    compressed, layers, ratio = _compressed(dense, request, progress)
    models, left_out = providers(dense, compressed, layers, request.backends)
    quality = {} if text is None else _perplexities(models, tokenizer, text, request, progress)
    device = first_device(dense)
    card = measure_card(device, dense.dtype)
    bench = _Bench(request, card, conditions(card, device), tuple(layers), ratio, quality)
    for batch_size in request.batch_sizes:
        records = bench.measure(models, batch_size, progress)
        yield [*(bench.left_out(name, batch_size, reason) for name, reason in left_out.items()), *records]


def _compressed(
    dense: PreTrainedModel, request: ModelRequest, progress: Progress
) -> tuple[PreTrainedModel, list[int], float]:
    """The low-rank model, its low-rank layers, and the fraction of their parameters that they keep."""
    if request.checkpoint is None:
        chosen = pick_layers(request.layers, request.num_layers, len(decoder(dense).layers))
        compressed = copy.deepcopy(dense)
        truncate_(compressed, chosen, request.retain_ratio, progress=progress)
        return compressed, *low_rank_layers(dense, compressed, request.model)
    dtype = str(dense.dtype).removeprefix("torch.")
    compressed, _ = load_quietly(request.checkpoint, dtype=dtype, device=request.device, progress=progress)
    return compressed, *low_rank_layers(dense, compressed, request.checkpoint)


def _perplexities(
    models: Mapping[str, ModelProvider],
    tokenizer: PreTrainedTokenizerBase,
    text: Iterable[str],
    request: ModelRequest,
    progress: Progress,
) -> dict[str, PerplexityResult]:
    """Perplexity by provider, measured once per set of weights: backends and the unfused form share it."""
    bos = bos_for(tokenizer)
    tokens = tokenize(tokenizer, text, limit=request.windows * (request.window - (bos is not None)))
    measured: dict[str, PerplexityResult] = {}
    for name in (DENSE, REMOVED, COMPRESSED):
        if name in models:
            measured[name] = perplexity(
                *(models[name].prepared(), tokens),
                window=request.window,
                bos_token_id=bos,
                progress=named(progress, name),
            )
    return {name: measured[name if name in measured else COMPRESSED] for name in models}


@dataclass(frozen=True)
class _Bench:
    """The facts that all batch sizes share."""

    request: ModelRequest
    card: Card
    now: Conditions
    layers: tuple[int, ...]
    retain_ratio: float
    quality: Mapping[str, PerplexityResult]

    def left_out(self, provider: str, batch_size: int, reason: str, *, wrong: bool = False) -> NotMeasured:
        return NotMeasured("model", provider, reason, wrong, model=self.request.model, batch_size=batch_size)

    def measure(
        self, models: Mapping[str, ModelProvider], batch_size: int, progress: Progress
    ) -> list[ModelResult | NotMeasured]:
        """Check all models at a batch size, then time the ones with right logits."""
        records: list[ModelResult | NotMeasured] = []
        rows = (batch_size * self.request.prompt_tokens, batch_size)
        able: dict[str, ModelProvider] = {}
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
                reason = f"logits differ from the reference backend's by {value:.1e}, expected at most {tolerance:.0e}"
                records.append(self.left_out(name, batch_size, reason, wrong=True))
        for name, result in self.quality.items():
            if name in able and not math.isfinite(result.perplexity):
                reason = f"perplexity: {result.nonfinite} of {result.tokens} tokens have a NaN or infinite loss"
                records.append(self.left_out(name, batch_size, reason))
        timed = time_models(able, self.request, batch_size, progress)
        dense = [Sample(tuple(seconds)) for seconds in _phases(timed[DENSE][0])]
        for name, (times, peak) in timed.items():
            records.append(self._result(name, able[name], batch_size, times, peak, dense, apart.get(name)))
        return records

    def _differences(
        self, models: Mapping[str, ModelProvider], batch_size: int, progress: Progress
    ) -> dict[str, float]:
        """Difference of every low-rank model's logits from the reference backend's with the same weights."""
        sizes = {"prompt_tokens": self.request.prompt_tokens, "batch_size": batch_size}
        low_rank = [name for name in models if name not in (DENSE, REMOVED)]
        expected = first_logits(ModelProvider(models[COMPRESSED].model, REFERENCE).prepared(), **sizes)
        differences = {}
        for done, name in enumerate(low_rank, start=1):
            differences[name] = difference(first_logits(models[name].prepared(), **sizes), expected)
            progress(f"checking batch {batch_size}", done, len(low_rank))
        return differences

    def _result(
        self,
        name: str,
        provider: ModelProvider,
        batch_size: int,
        times: Sequence[GenerationTime],
        peak: int | None,
        dense: Sequence[Sample],
        apart: float | None,
    ) -> ModelResult:
        request, model = self.request, provider.model
        size, cache = model_size(model, decoder(model).layers), times[-1].kv_cache_bytes
        prefill, decode = (Sample(tuple(seconds)) for seconds in _phases(times))
        steps = percentiles([step for time in times for step in time.steps_s])
        share = request.prompt_tokens / (request.prompt_tokens + request.new_tokens)
        least = floors(model, self.card, batch_size, request.prompt_tokens, int(cache * share))
        limits: Sequence[float | None] = [1e3 * seconds for seconds in least] or [None, None]
        first, whole = percentiles([time.first_token_s for time in times]), percentiles(prefill.seconds)
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
    return [time.prefill_s for time in times], [time.decode_s for time in times]
