"""The records of the benchmarks: one class each, which is the schema of its JSON lines and describes its table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from grasp.bench.conditions import Conditions
from grasp.bench.percentiles import Percentiles
from grasp.bench.recorded import WorkloadResult
from grasp.bench.schema import Record
from grasp.bench.serve_records import ServeResult
from grasp.formatting import Column, count, layer_ranges, model_name, share, size

PLAIN_SVD = "plain SVD"  # factors of a model that was compressed only to time it
_fixed, _ratio, _significant = "{:.1f}".format, "{:.2f}".format, "{:.4g}".format


def _parts(sizes: Mapping[str, int]) -> str | None:
    """Bytes by type of the numbers; ``None`` if there is one type."""
    return ", ".join(f"{name} {size(part)}" for name, part in sizes.items()) if len(sizes) > 1 else None


@dataclass(frozen=True)
class OpResult(Record):
    """The time of one provider in one case of ``grasp bench ops``.

    Attributes:
        op: ``lowrank_linear``, ``lowrank_linear_grouped``, ``lowrank_glu`` or ``singular_value_grad``.
        provider: a backend, ``unfused``, ``compiled``, ``dense``, or beside quantised factors ``floating``: what
            ``auto`` runs with the factors before they were quantised.
        shape: K inputs, N outputs and rank R of each linear as ``KxNrR``. ``+`` joins linears that share an input.
        rows: tokens per call, M.
        dtype: of inputs and floating factors: ``float32``, ``bfloat16`` or ``float16``.
        median_us: median time of a call, µs.
        spread: distance between the quartiles of the times over their median.
        floor_us: least time of a call, µs: its bytes or FLOPs at the measured speeds, without the launch. Providers
            other than ``dense`` have the floor of the fused op. ``None`` for the dense gradient.
        share_of_floor: ``floor_us`` over ``median_us``. 1 is as fast as this machine can be.
        speedup_over_unfused: time of ``unfused`` over the time of this provider: the median over the repetitions.
        speedup_over_dense: the same over ``dense``.
        repetitions: number of turns of every provider.
        calls_per_repetition: number of calls that are timed together.
        rotated_copies: number of distinct sets of weights that the calls use in turn.
        conditions: when and where.
        model: the model that has this shape; ``None`` if the shape was given.
        form: ``factored``, ``pivoted``, or the form of each linear, joined by ``+``.
        calls: number of calls in the recorded workload; ``None`` without one.
        chosen: whether ``auto`` gives the call to this provider.
        weights: how the factors of the backends are quantised, such as ``int4/64``, or those of each linear, joined by
            ``+``; ``None`` if all are floating.

    Example:
        >>> [column.heading for column in OpResult.case[:4]]
        ['op', 'shape', 'rows', 'dtype']
    """

    op: str
    provider: str
    shape: str
    rows: int
    dtype: str
    median_us: float
    spread: float
    floor_us: float | None
    share_of_floor: float | None
    speedup_over_unfused: float
    speedup_over_dense: float
    repetitions: int
    calls_per_repetition: int
    rotated_copies: int
    conditions: Conditions
    model: str | None = None
    form: str = "factored"
    calls: int | None = None
    chosen: bool = False
    weights: str | None = None

    kind: ClassVar[str] = "op"
    title: ClassVar[str] = "Ops"
    case: ClassVar[tuple[Column, ...]] = (
        Column("op", "op"),
        Column("shape", "shape"),
        Column("rows", "rows"),
        Column("dtype", "dtype"),
        Column("form", lambda result: None if result.form == "factored" else result.form),
        Column("weights", "weights"),
        Column("calls", "calls"),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("provider", "provider"),
        Column("median µs", "median_us", _significant),
        Column("spread", "spread", share),
        Column("floor µs", "floor_us", _significant),
        Column("of floor", "share_of_floor", share),
        Column("× unfused", "speedup_over_unfused", _ratio),
        Column("× dense", "speedup_over_dense", _ratio),
    )
    legend: ClassVar[str] = (
        "The floor is the time of the call's bytes or FLOPs at the speeds measured in this run; of floor is the share "
        "of it that was reached. × is a speed-up. Spread is the distance between the quartiles over the median."
    )
    figures: ClassVar[tuple[str, ...]] = ("grasp.reporting.pictures:rooflines",)
    missing: ClassVar[str] = "speed of the ops"
    command: ClassVar[str] = "grasp bench ops -o op.jsonl"


@dataclass(frozen=True)
class ModelResult(Record):
    """One provider of one model at one batch size in ``grasp bench model``: greedy decoding with a KV cache.

    Attributes:
        model: name as it was given.
        provider: ``dense``, ``removed``, ``compressed`` (the model as users get it), ``compressed/BACKEND``,
            ``dense/kernel`` and ``compressed/kernel`` (see ``use_kernel_``), ``unfused``, or a yardstick:
            ``llama.cpp``, a comma, and the type of its weights or its file.
        backend: backend of all low-rank linears. ``auto`` chooses for each call. ``None`` without low-rank linears.
        factors: ``plain SVD``, or the name of the compressed checkpoint.
        dtype: of the weights, except a yardstick's.
        layers: layers that are low-rank, numbered as in the compressed model; those that ``removed`` lacks.
        retain_ratio: parameters of the factors over the parameters of the matrices that they replace.
        batch_size: sequences at a time.
        prompt_tokens: tokens of each prompt.
        new_tokens: decoding steps after the first token.
        repeats: number of turns of every provider, after one turn that warms up.
        parameters: number of parameters of the whole model; tied parameters count once.
        weight_bytes: bytes of these parameters.
        kv_cache_bytes: bytes of keys and values of all layers and sequences after the last step.
        peak_memory_bytes: most bytes held above the loaded weights during one generation, with its KV cache. ``None``
            if the system does not report it.
        prefill_ms: forward pass of the prompt, ms.
        first_token_ms: from the prompt to its first token, both on the host, ms.
        inter_token_ms: from one token on the host to the next, over all turns, ms.
        prefill_floor_ms: least time of the matrix products, ms: their bytes or FLOPs at the measured speeds, without
            attention. ``None`` for a mixture of experts.
        inter_token_floor_ms: the same for a decoding step, with the bytes of the KV cache.
        prefill_share_of_floor: floor over p50.
        inter_token_share_of_floor: floor over p50.
        prefill_tokens_per_s: tokens of the whole batch over the median prefill time.
        prefill_spread: distance between the quartiles of the times over their median.
        prefill_speedup_over_dense: time of ``dense`` in the same mode over the time of this provider: the median over
            the turns. ``None`` if ``dense`` was not timed.
        decode_tokens_per_s: tokens of the whole batch over the median time of all steps.
        decode_spread: like ``prefill_spread``.
        decode_speedup_over_dense: like ``prefill_speedup_over_dense``.
        logits_difference: norm-wise relative difference of the logits from those of the same weights on the
            ``reference`` backend; the larger one of the prompt and one step. ``None`` for ``dense`` and ``removed``.
            Of a yardstick, the difference from ``dense`` after the prompt.
        perplexity: perplexity of the weights on backend ``auto``. ``None`` if it was not measured or is not finite.
        perplexity_text: name of the text of the perplexity.
        perplexity_tokens: number of tokens that were scored.
        note: a remark that readers need, or an empty string.
        conditions: when and where.
        mode: ``eager``, or ``compiled``: steps by ``torch.compile`` over a static KV cache, prompts eagerly.
        depth: tokens before the prompt, which are in the KV cache when the time begins.
        output_token_ms: time of all steps over their number (TPOT), over the turns, ms.
        end_to_end_ms: from the prompt to the last token, over the turns, ms.
        load_s: seconds to load the model; ``None`` if it was made in memory.
        stopped: why there were no more turns: ``repeats``, ``min-seconds``, ``precision`` (the 95 % intervals of the
            medians of ``first_token_ms`` and ``output_token_ms`` of all providers were narrow enough) or
            ``max-seconds`` (they were not).
        dtype_bytes: ``weight_bytes`` by type of the numbers, see ``bytes_by_dtype``; {} of a yardstick.

    Example:
        >>> [column.heading for column in ModelResult.columns[:3]]
        ['provider', 'prefill ms', 'floor ms']
    """

    model: str
    provider: str
    backend: str | None
    factors: str
    dtype: str
    layers: tuple[int, ...]
    retain_ratio: float
    batch_size: int
    prompt_tokens: int
    new_tokens: int
    repeats: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes: int
    peak_memory_bytes: int | None
    prefill_ms: Percentiles
    first_token_ms: Percentiles
    inter_token_ms: Percentiles
    prefill_floor_ms: float | None
    inter_token_floor_ms: float | None
    prefill_share_of_floor: float | None
    inter_token_share_of_floor: float | None
    prefill_tokens_per_s: float
    prefill_spread: float
    prefill_speedup_over_dense: float | None
    decode_tokens_per_s: float
    decode_spread: float
    decode_speedup_over_dense: float | None
    logits_difference: float | None
    perplexity: float | None
    perplexity_text: str | None
    perplexity_tokens: int | None
    note: str
    conditions: Conditions
    mode: str = "eager"
    depth: int = 0
    output_token_ms: Percentiles | None = None
    end_to_end_ms: Percentiles | None = None
    load_s: float | None = None
    stopped: str = "repeats"
    dtype_bytes: Mapping[str, int] = field(default_factory=dict)

    kind: ClassVar[str] = "model"
    title: ClassVar[str] = "The whole model"
    case: ClassVar[tuple[Column, ...]] = (
        Column("model", "model", model_name),
        Column("dtype", "dtype"),
        Column("layers", "layers", layer_ranges),
        Column("factors", "factors"),
        Column("parameters kept", "retain_ratio", share),
        Column("batch", "batch_size"),
        Column("prompt tokens", "prompt_tokens"),
        Column("new tokens", "new_tokens"),
        Column("depth", lambda result: result.depth or None),
        Column("threads", lambda result: result.conditions.threads),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("provider", lambda result: result.provider + f", {result.mode}" * (result.mode != "eager")),
        Column("prefill ms", "prefill_ms"),
        Column("floor ms", "prefill_floor_ms", _fixed),
        Column("of floor", "prefill_share_of_floor", share),
        Column("prefill × dense", "prefill_speedup_over_dense", _ratio),
        Column("first token ms", "first_token_ms"),
        Column("ms per token", "inter_token_ms"),
        Column("floor ms", "inter_token_floor_ms", _fixed),
        Column("of floor", "inter_token_share_of_floor", share),
        Column("end to end ms", "end_to_end_ms"),
        Column("decode tokens/s", "decode_tokens_per_s", _fixed),
        Column("±", lambda result: result.output_token_ms and result.output_token_ms.precision, share),
        Column("spread", "decode_spread", share),
        Column("decode × dense", "decode_speedup_over_dense", _ratio),
        Column("parameters", "parameters", count),
        Column("weights", "weight_bytes", size),
        Column("of which", lambda result: _parts(result.dtype_bytes)),
        Column("KV cache", "kv_cache_bytes", size),
        Column("peak", "peak_memory_bytes", size),
        Column("loaded in s", "load_s", _significant),
        Column("perplexity", "perplexity", _significant),
        Column("logits off", "logits_difference", "{:.0e}".format),
    )
    legend: ClassVar[str] = (
        "Milliseconds are p50, p95 and p99. The floor is the time of the weights' bytes or FLOPs at the measured "
        "speeds; of floor is the share of it that was reached. × dense is a speed-up. ± is how far the 95 % interval "
        "of the median time per output token reaches from it, over it; spread is the distance between the quartiles of "
        "the decoding time, over its median. Peak is above the loaded weights. Logits off is the relative difference "
        "from the reference backend."
    )
    figures: ClassVar[tuple[str, ...]] = (
        "grasp.reporting.pictures:perplexity_by_size",
        "grasp.reporting.pictures:speed_by_cost",
        "grasp.reporting.pictures:latency_bars",
    )
    missing: ClassVar[str] = "speed and memory of the whole model"
    command: ClassVar[str] = "grasp bench model {model} --compressed {folder} -o model.jsonl"

    def notes(self) -> Iterator[str]:
        """Conditions, the text of the perplexity, why the turns ended, and the note."""
        yield from super().notes()
        if self.perplexity_text is not None:
            yield f"Perplexity on {self.perplexity_tokens} held-out tokens of {self.perplexity_text}."
        if self.stopped != "repeats":
            yield f"Turns ended after {self.repeats}: {self.stopped}."
        if self.note:
            yield self.note


@dataclass(frozen=True)
class NotMeasured(Record):
    """A case that a benchmark left out, and the reason. Fields that do not apply are ``None``.

    Attributes:
        benchmark: ``ops``, ``model`` or ``serve``.
        provider: as in the other results; ``*`` for all.
        not_measured: the reason.
        wrong: whether the provider ran and gave a wrong result.
        op: of ``ops``.
        shape: of ``ops``.
        rows: of ``ops``.
        dtype: of ``ops``.
        model: name of the model, or of the model that has the shape.
        batch_size: of ``model``.

    Example:
        >>> NotMeasured("ops", "cuda", "no CUDA device").to_dict()["kind"]
        'not_measured'
    """

    benchmark: str
    provider: str
    not_measured: str
    wrong: bool = False
    op: str | None = None
    shape: str | None = None
    rows: int | None = None
    dtype: str | None = None
    model: str | None = None
    batch_size: int | None = None

    kind: ClassVar[str] = "not_measured"
    title: ClassVar[str] = "Left out, and why"
    columns: ClassVar[tuple[Column, ...]] = (
        Column("benchmark", "benchmark"),
        Column("provider", "provider"),
        Column("op", "op"),
        Column("shape", "shape"),
        Column("rows", "rows"),
        Column("dtype", "dtype"),
        Column("batch", "batch_size"),
        Column("result", lambda line: "wrong" if line.wrong else "none"),
        Column("reason", "not_measured"),
    )


RECORDS: tuple[type[Record], ...] = (
    ModelResult,
    OpResult,
    WorkloadResult,
    ServeResult,
    NotMeasured,
)
