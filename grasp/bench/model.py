"""Time a whole model: dense, with layers removed, low-rank on each backend, and low-rank unfused.

The low-rank layers come from a compressed checkpoint, or from plain SVD at GRASP's ranks: speed depends on shapes
alone. A model is timed only if its logits are right, see ``grasp.bench.decoding.checked``.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.decoding import EAGER, MODES, Case, Generator, Key, Turns, checked, floors, time_models
from grasp.bench.memory import leaving_out, records_within_memory
from grasp.bench.percentiles import Percentiles
from grasp.bench.providers import (
    COMPRESSED,
    DENSE,
    REMOVED,
    TOO_LARGE,
    ModelProvider,
    low_rank_layers,
    objections,
    pick_layers,
    providers,
    require_names,
    truncate_,
    weights_of,
)
from grasp.bench.records import PLAIN_SVD, ModelResult, NotMeasured
from grasp.bench.timing import Sample, StopRule
from grasp.bench.yardstick import Agreement, Yardstick, require_yardsticks, yardsticks
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, read_pieces, tokenize
from grasp.errors import GraspError
from grasp.evaluation.generation import GenerationTime, random_prompt
from grasp.evaluation.perplexity import PerplexityResult, perplexity
from grasp.files import expanded
from grasp.loading import load_quietly
from grasp.model.running import first_device
from grasp.model.size import bytes_by_dtype, model_size
from grasp.model.targets import decoder
from grasp.progress import Progress, named, no_progress
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.roofline import Card
from speedgate.timing import using_threads

NOTE = "Factors by plain SVD: GRASP at these ranks has the same speed, but not this perplexity."
NUM_LAYERS, RETAIN_RATIO = 6, 0.1  # of plain SVD; the ratio is the paper's
# torch.compile counts each model at each size as one more version of the same code.
_VERSIONS = {"recompile_limit": 1 << 16, "accumulated_recompile_limit": 1 << 16}


@dataclass(frozen=True)
class ModelRequest:
    """Settings of one run."""

    model: str = BUILTIN  # the dense model, as for ``load_model``
    # the compressed model, as for ``load_model``; ``None`` for plain SVD of the layers below
    checkpoint: str | None = None
    layers: tuple[int, ...] | None = None  # layers to make low-rank; ``None`` for ``num_layers`` in the middle
    num_layers: int | None = None  # number of low-rank layers; ``None`` for ``NUM_LAYERS``
    # fraction of each matrix's parameters that its factors have; ``None`` for ``RETAIN_RATIO``
    retain_ratio: float | None = None
    modes: Sequence[str] = (EAGER,)  # some of ``MODES``
    batch_sizes: Sequence[int] = (1, 4, 16)  # numbers of sequences per batch
    prompt_tokens: Sequence[int] = (128,)  # prompt lengths
    new_tokens: Sequence[int] = (16,)  # numbers of decoding steps
    depths: Sequence[int] = (0,)  # numbers of tokens before the prompt, which are in the KV cache when the time begins
    stop: StopRule = field(default_factory=StopRule)  # when the turns of the models end, at each size
    backends: Sequence[str] = ()  # names in the dispatch table; all if empty
    text: str = BUILTIN  # text of the perplexity, as for ``read_pieces``
    window: int = 512  # tokens per window of the text
    windows: int = 16  # number of windows; 0 for no perplexity
    dtype: str = "auto"  # as for ``load_model``
    device: str | None = None  # as for ``load_model``
    threads: Sequence[int] = ()  # numbers of CPU threads; PyTorch's choice if empty
    yardsticks: Sequence[str] = ()  # as for ``grasp.bench.yardstick.yardsticks``

    @property
    def cases(self) -> list[Case]:
        """All combinations of the sizes."""
        sizes = (self.batch_sizes, self.prompt_tokens, self.new_tokens, self.depths)
        return [Case(*values) for values in product(*sizes)]


def run(request: ModelRequest, *, progress: Progress = no_progress) -> Iterator[list[ModelResult | NotMeasured]]:
    """Measure the sizes one after the other, with each number of threads.

    Raises:
        GraspError, ValueError: from ``load_model``, ``read_pieces``, ``pick_layers``, ``low_rank_layers``,
            ``truncate_``, ``perplexity``, ``time_generation``, ``require_yardsticks`` and ``yardsticks``.
    """
    require_names(request.backends, [row.name for row in BACKENDS], "backend")
    require_names(request.modes, MODES, "mode")
    require_yardsticks(request.yardsticks)
    given = [name for name in ("layers", "num_layers", "retain_ratio") if getattr(request, name) is not None]
    if request.checkpoint is not None and given:
        raise ValueError(f"a compressed checkpoint has its own layers and ranks; leave out {' and '.join(given)}")
    text = read_pieces(request.text, split="evaluation") if request.windows else None
    first, *others = request.threads or (None,)
    with torch.compiler.config.patch(_VERSIONS):  # type: ignore[attr-defined]  # made when it is imported
        with using_threads(first):
            bench = _prepare(request, text, progress)
        dense = bench.models[DENSE].model
        with yardsticks(request.yardsticks, dense, progress) as outside:
            with using_threads(first):
                yield from replace(bench, outside=outside).run(progress)
            for count in others:
                with using_threads(count):
                    yield from replace(bench, outside=outside, **_speeds(dense)).run(progress)


def _prepare(request: ModelRequest, text: Iterable[str] | None, progress: Progress) -> _Bench:
    """Load the models, and measure their perplexity."""
    start = time.perf_counter()
    dense, tokenizer = load_quietly(request.model, dtype=request.dtype, device=request.device, progress=progress)
    seconds = {DENSE: time.perf_counter() - start}
    for case in request.cases:
        random_prompt(dense, case.prompt_tokens, case.new_tokens, case.batch_size, case.depth)  # raises if impossible
    start = time.perf_counter()
    models, ratio = {DENSE: ModelProvider(dense)}, 1.0
    layers: list[int] = []
    left_out: dict[str, str] = {}
    with leaving_out(left_out, COMPRESSED, TOO_LARGE):
        compressed, layers, ratio = _compressed(dense, request, progress)
        if request.checkpoint is not None:
            seconds[COMPRESSED] = time.perf_counter() - start
        models, left_out = providers(dense, compressed, layers, request.backends)
    quality, unrated = ({}, {}) if text is None else _perplexities(models, tokenizer, text, request, progress)
    return _Bench(request, models, left_out, tuple(layers), ratio, seconds, quality, unrated, **_speeds(dense))


def _speeds(model: PreTrainedModel) -> dict[str, Any]:
    """The device's speeds with the present number of threads, and the conditions."""
    device = first_device(model)
    card = measure_card(device, model.dtype)
    return {"card": card, "now": conditions(card, device)}


def _compressed(
    dense: PreTrainedModel, request: ModelRequest, progress: Progress
) -> tuple[PreTrainedModel, list[int], float]:
    """The low-rank model, its low-rank layers, and the fraction of their parameters that they keep."""
    if request.checkpoint is None:
        number = NUM_LAYERS if request.num_layers is None else request.num_layers
        ratio = RETAIN_RATIO if request.retain_ratio is None else request.retain_ratio
        chosen = pick_layers(request.layers, number, len(decoder(dense).layers))
        compressed = copy.deepcopy(dense)
        truncate_(compressed, chosen, ratio, progress=progress)
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
) -> tuple[dict[str, PerplexityResult], dict[str, str]]:
    """Perplexity by provider, and why others have none. Backends and the unfused form share that of their weights."""
    bos = bos_for(tokenizer)
    tokens = tokenize(tokenizer, text, limit=request.windows * (request.window - (bos is not None)))
    too_large = f"the device has too little memory for windows of {request.window} tokens; give a smaller --window"
    measured: dict[str, PerplexityResult] = {}
    reasons: dict[str, str] = {}
    for name in (DENSE, REMOVED, COMPRESSED):
        if name not in models:
            continue
        with leaving_out(reasons, name, too_large):
            result = measured[name] = perplexity(
                *(models[name].prepared(), tokens),
                window=request.window,
                bos_token_id=bos,
                progress=named(progress, name),
            )
            if not math.isfinite(result.perplexity):
                reasons[name] = f"{result.nonfinite} of {result.tokens} tokens have a NaN or infinite loss"
    quality = {name: measured[weights_of(name)] for name in models if weights_of(name) in measured}
    return quality, {name: reasons[weights_of(name)] for name in models if weights_of(name) in reasons}


class _Facts(NamedTuple):
    """Fields of a result that are not measured times."""

    backend: str | None
    load_s: float | None
    parameters: int
    weight_bytes: int
    dtype_bytes: Mapping[str, int]
    peak_memory_bytes: int | None
    prefill_floor_ms: float | None
    inter_token_floor_ms: float | None
    logits_difference: float | None
    note: str


@dataclass(frozen=True)
class _Bench:
    """The models, and the facts that all sizes share."""

    request: ModelRequest
    models: Mapping[str, ModelProvider]
    impossible: Mapping[str, str]  # providers that could not be made, and why
    layers: tuple[int, ...]
    retain_ratio: float
    load_seconds: Mapping[str, float]
    quality: Mapping[str, PerplexityResult]
    unrated: Mapping[str, str]  # providers without a finite perplexity, and why
    card: Card
    now: Conditions
    outside: Sequence[Yardstick] = ()

    def run(self, progress: Progress) -> Iterator[list[ModelResult | NotMeasured]]:
        """Measure all sizes."""
        for case in self.request.cases:
            yield list(records_within_memory(self.measure(case, progress), self.left_out("*", case, _too_large(case))))

    def left_out(self, provider: str, case: Case, reason: str, *, wrong: bool = False) -> NotMeasured:
        return NotMeasured("model", provider, reason, wrong, model=self.request.model, batch_size=case.batch_size)

    def measure(self, case: Case, progress: Progress) -> Iterator[ModelResult | NotMeasured]:
        """Check all models at these sizes, then time the ones with right logits."""
        reasons = {name: objections(provider, case.rows) for name, provider in self.models.items()}
        refused = {**self.impossible, **{name: reason for name, reason in reasons.items() if reason is not None}}
        for name, reason in refused.items():
            yield self.left_out(name, case, reason)
        able = {name: provider for name, provider in self.models.items() if name not in refused}
        right = checked(able, self.request.modes, case, progress)
        for key, (reason, wrong) in right.refused.items():
            name = key.provider if key.mode == EAGER else f"{key.provider}, {key.mode}"
            yield self.left_out(name, case, reason, wrong=wrong)
        for name, reason in self.unrated.items():
            if name in able:
                yield self.left_out(name, case, f"perplexity: {reason}")
        facts = {key: partial(self._facts, key, case, right.apart.get(key)) for key in right.models}
        outside: dict[Key, Generator] = {}
        for yardstick in self.outside:
            failed: dict[str, str] = {}
            with leaving_out(failed, yardstick.name, _too_large(case), (GraspError,)):
                yardstick.prepare(case)
                agreement = yardstick.agreement(case)
            if failed:
                yield self.left_out(yardstick.name, case, failed[yardstick.name])
            elif agreement.apart <= yardstick.tolerance:
                outside[key := Key(yardstick.name, EAGER)] = yardstick
                facts[key] = partial(_outside_facts, yardstick, agreement)
            else:
                reason = (
                    f"logits are off by {agreement.apart:.1e}, expected at most {yardstick.tolerance:.0e} from dense"
                )
                yield self.left_out(yardstick.name, case, reason, wrong=True)
        turns = time_models({**right.models, **outside}, case, self.request.stop, progress)
        for key in turns.times:
            yield self._result(key, case, turns, facts[key](turns))

    def _facts(self, key: Key, case: Case, apart: float | None, turns: Turns) -> _Facts:
        (model, backend), cache = self.models[key.provider], turns.times[key][-1].kv_cache_bytes
        size = model_size(model)
        share = 1 - case.new_tokens / (case.depth + case.prompt_tokens + case.new_tokens)
        least = floors(model, self.card, case.batch_size, case.prompt_tokens, int(cache * share))
        prefill, step = [1e3 * seconds for seconds in least] or (None, None)
        return _Facts(
            backend=backend,
            load_s=self.load_seconds.get(key.provider),
            parameters=size.parameters,
            weight_bytes=size.bytes,
            dtype_bytes=bytes_by_dtype(model),
            peak_memory_bytes=turns.peaks[key],
            prefill_floor_ms=prefill,
            inter_token_floor_ms=step,
            logits_difference=apart,
            note=NOTE if self.request.checkpoint is None else "",
        )

    def _result(self, key: Key, case: Case, turns: Turns, facts: _Facts) -> ModelResult:
        request, times = self.request, turns.times[key]
        dense = _phases(turns.times.get(Key(DENSE, key.mode), ()))
        prefill, decode = _phases(times)
        steps = Percentiles.of([step for time in times for step in time.steps_s])
        whole, limits = Percentiles.of(prefill.seconds), (facts.prefill_floor_ms, facts.inter_token_floor_ms)
        quality = self.quality.get(key.provider)
        finite = quality is not None and math.isfinite(quality.perplexity)
        return ModelResult(
            model=request.model,
            provider=key.provider,
            **facts._asdict(),
            factors=PLAIN_SVD if request.checkpoint is None else expanded(request.checkpoint).resolve().name,
            dtype=str(self.models[DENSE].model.dtype).removeprefix("torch."),
            layers=self.layers,
            retain_ratio=self.retain_ratio,
            **case._asdict(),
            mode=key.mode,
            repeats=len(times),
            stopped=turns.stopped,
            kv_cache_bytes=times[-1].kv_cache_bytes,
            prefill_ms=whole,
            first_token_ms=Percentiles.of([time.first_token_s for time in times]),
            inter_token_ms=steps,
            output_token_ms=Percentiles.of([time.decode_s / case.new_tokens for time in times]),
            end_to_end_ms=Percentiles.of([time.first_token_s + time.decode_s for time in times]),
            prefill_share_of_floor=None if limits[0] is None else limits[0] / whole.p50,
            inter_token_share_of_floor=None if limits[1] is None else limits[1] / steps.p50,
            prefill_tokens_per_s=case.batch_size * case.prompt_tokens / prefill.median,
            prefill_spread=prefill.spread,
            prefill_speedup_over_dense=prefill.speedup_over(dense[0]) if dense[0].seconds else None,
            decode_tokens_per_s=case.batch_size * case.new_tokens / decode.median,
            decode_spread=decode.spread,
            decode_speedup_over_dense=decode.speedup_over(dense[1]) if dense[1].seconds else None,
            perplexity=quality.perplexity if quality is not None and finite else None,
            perplexity_text=None if quality is None else Path(request.text).name,
            perplexity_tokens=None if quality is None else quality.tokens,
            conditions=self.now,
        )


def _too_large(case: Case) -> str:
    tokens = case.depth + case.prompt_tokens + case.new_tokens
    return f"the device has too little memory for batches of {case.batch_size} x {tokens} tokens"


def _outside_facts(yardstick: Yardstick, agreement: Agreement, turns: Turns) -> _Facts:
    return _Facts(
        backend=None,
        load_s=yardstick.load_s,
        parameters=yardstick.parameters,
        weight_bytes=yardstick.weight_bytes,
        dtype_bytes={},
        peak_memory_bytes=None,
        prefill_floor_ms=None,
        inter_token_floor_ms=None,
        logits_difference=agreement.apart,
        note=f"{yardstick.name}: {yardstick.about}; the first {agreement.same} of {agreement.tokens} greedy tokens are "
        "those of dense.",
    )


def _phases(times: Sequence[GenerationTime]) -> tuple[Sample, Sample]:
    """The prefills and the decoding steps of all turns."""
    return Sample(tuple(time.prefill_s for time in times)), Sample(tuple(time.decode_s for time in times))
