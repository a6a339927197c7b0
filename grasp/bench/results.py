"""What the benchmarks measured, as JSON lines: these dataclasses are the schema, ``docs/benchmarks.md`` explains it.

Each line is one object: ``kind`` says which dataclass, ``schema_version`` of which revision, the rest are its fields.
"""

from __future__ import annotations

import json
import types
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Union, get_args, get_origin, get_type_hints

from grasp.bench.conditions import Conditions
from grasp.errors import ResultsError

SCHEMA_VERSION = 1  # of all kinds; it grows when a field is removed, given another meaning, or added with no default


@dataclass(frozen=True)
class Percentiles:
    """Of the times of one thing, interpolated between the nearest two; of fewer than 100 times p99 is a guess."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class OpResult:
    """One provider's time in one case of ``grasp bench ops``."""

    kind: ClassVar[str] = "op"
    op: str
    provider: str  # a backend, "unfused", "compiled" or "dense"
    shape: str  # KxNrR of each linear
    rows: int
    dtype: str
    median_us: float
    spread: float  # distance between the quartiles, fraction of the median
    floor_us: float | None  # of this provider; launches excluded
    share_of_floor: float | None  # floor over median
    speedup_over_unfused: float
    speedup_over_dense: float
    repetitions: int
    calls_per_repetition: int
    rotated_copies: int
    conditions: Conditions
    model: str | None = None  # whose shape it is; None where the shape was given


@dataclass(frozen=True)
class ModelResult:
    """One provider of one model at one batch size in ``grasp bench model``. Greedy, with a KV cache."""

    kind: ClassVar[str] = "model"
    model: str
    provider: str  # "dense", "removed", "compressed", "compressed/BACKEND" or "unfused"
    backend: str | None  # that all low-rank linears ran on; None where the provider has none
    factors: str  # "plain SVD", or the name of the compressed checkpoint
    dtype: str
    layers: tuple[int, ...]  # that are low-rank or removed in the other models than the dense one
    retain_ratio: float  # parameters of the factors over those of the matrices that they replace
    batch_size: int
    prompt_tokens: int  # of each sequence
    new_tokens: int  # decoding steps after the first token
    repeats: int
    parameters: int
    weight_bytes: int
    kv_cache_bytes: int  # after the last step
    peak_memory_bytes: int | None  # above the loaded weights, of one generation; None where unknown
    prefill_ms: Percentiles  # forward pass of the prompt
    first_token_ms: Percentiles  # from the prompt to its first token, both on the host
    inter_token_ms: Percentiles  # from a token on the host to the next
    prefill_floor_ms: float | None  # FLOPs or bytes of the weights at the measured speed; None for experts
    inter_token_floor_ms: float | None  # likewise, and the KV cache's bytes
    prefill_share_of_floor: float | None  # floor over p50
    inter_token_share_of_floor: float | None
    prefill_tokens_per_s: float  # median, of the whole batch
    prefill_spread: float  # distance between the quartiles of the times, fraction of their median
    prefill_speedup_over_dense: float  # repetition by repetition, median
    decode_tokens_per_s: float
    decode_spread: float
    decode_speedup_over_dense: float
    logits_difference: float | None  # norm-wise and relative, from the reference backend; None where there is none
    perplexity: float | None  # of the weights; None where not measured or not finite
    perplexity_text: str | None
    perplexity_tokens: int | None  # that were scored
    note: str
    conditions: Conditions


@dataclass(frozen=True)
class CompressResult:
    """One schedule of ``grasp bench compress``. Seconds are of the attribution of all sequences."""

    kind: ClassVar[str] = "compress"
    model: str
    layers: tuple[int, ...]
    retain_ratio: float
    schedule: str
    sweep_dtype: str | None  # of the package's sweeps; the naive ones are fp32
    batch_size: int  # of the package's sweeps; the naive ones take a sequence at a time
    sequences: int
    seq_len: int
    timed_sequences: int  # of each sweep
    extrapolated: bool  # from those to all sequences
    seconds: float
    seconds_prefix: float  # of that, the hidden states that are kept
    seconds_contraction: float  # of that, gradients in the weights with the factors
    spread: float  # slowest less fastest batch over the median, the worst sweep
    naive_seconds: float  # of the same schedule
    naive_spread: float
    yardstick_seconds: float  # naive, of the paper's schedule
    naive_svd_seconds: float  # left out above
    speedup: float  # over the yardstick
    speedup_same_schedule: float
    predicted_speedup: float  # over the yardstick, by FLOPs
    share_of_predicted: float | None  # where both sides run in one dtype, and a sequence at a time
    groups: int  # singular groups kept
    swaps: int  # of those, chosen differently
    largest_gap: float  # in importance, of those, relative to that of the last group kept
    memory_bytes: int | None  # above the loaded model, of two batches, without decompositions
    memory_estimate: int  # of the same
    perplexity: float | None  # compressed with this schedule and sweep_dtype, all sequences; only with a sweep_dtype
    perplexity_fp32: float | None  # the same with sweeps in the model's dtype
    conditions: Conditions


@dataclass(frozen=True)
class StudySetting:
    """What the cells of one study share."""

    model: str
    calibration: str
    text: str
    num_samples: int
    seq_len: int
    batch_size: int
    window: int
    windows: int | None  # of the text that are evaluated; ``None`` for all
    dtype: str  # in which the model is run over both texts; compressed weights are fp32 until then
    tasks: tuple[str, ...] = ()  # of lm-eval
    limit: int | None = None  # documents of each; ``None`` for all


@dataclass(frozen=True)
class StudyResult:
    """One method at one ratio with one seed, a cell of ``benchmarks/study/quality.py``."""

    kind: ClassVar[str] = "study"
    method: str
    ratio: float  # of the decoder's parameters, that was asked for
    seed: int
    setting: StudySetting
    removed: float  # fraction of the decoder's parameters that is gone
    parameters: int  # of the whole model
    perplexity: float
    excess: float  # nats per token over the dense model
    cpu_seconds: float  # of all threads, to compress, statistics included: what else the machine does counts nothing
    removed_layers: tuple[int, ...]
    ranks: Mapping[str, int]  # of the linears that are low-rank
    scope: str | None
    conditions: Conditions
    accuracy: Mapping[str, float] = field(default_factory=dict)  # lm-eval's ``acc`` of each task


@dataclass(frozen=True)
class StudyLatency:
    """How fast the model of a study's cell decodes one sequence, ``benchmarks/study/latency.py``."""

    kind: ClassVar[str] = "study_latency"
    model: str
    method: str
    ratio: float  # of the decoder's parameters; 0 is the dense model
    seed: int
    dtype: str
    new_tokens: int  # decoding steps of each turn
    inter_token_ms: Percentiles
    spread: float  # distance between the quartiles of the turns, fraction of the median
    of_dense: float  # time over the dense model's, turn by turn, median
    conditions: Conditions


@dataclass(frozen=True)
class NotMeasured:
    """What a benchmark left out, and why. What does not apply is ``None``."""

    kind: ClassVar[str] = "not_measured"
    benchmark: str  # "ops" or "model"
    provider: str  # "*" for all of them
    not_measured: str  # the reason
    wrong: bool = False  # the provider ran, and its result was not right
    op: str | None = None
    shape: str | None = None
    rows: int | None = None
    dtype: str | None = None
    model: str | None = None
    batch_size: int | None = None


Record = OpResult | ModelResult | CompressResult | StudyResult | StudyLatency | NotMeasured
KINDS: dict[str, type[Record]] = {
    record.kind: record for record in (OpResult, ModelResult, CompressResult, StudyResult, StudyLatency, NotMeasured)
}


def to_dict(record: Record) -> dict[str, Any]:
    """One line as an object: ``kind`` and ``schema_version`` before the fields."""
    return {"kind": record.kind, "schema_version": SCHEMA_VERSION, **asdict(record)}


def append_results(path: Path | None, records: Sequence[Record]) -> None:
    """Add lines to a file in one write; ``None`` is no file.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
        OSError: if the file cannot be written.
    """
    if path is None or not records:
        return
    text = "".join(json.dumps(to_dict(record), allow_nan=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def check_output(path: Path | None) -> None:
    """Find out, before hours are spent, that results can be added to a file; it is left as it is.

    Raises:
        ResultsError: if it holds anything but results of this schema, or its folder is missing.
    """
    if path is None:
        return
    if path.exists():
        read_results(path)
    elif not path.parent.is_dir():
        raise ResultsError(f"results cannot be written to {path}: there is no folder {path.parent}; make it first")


def read_results(path: str | Path) -> list[Record]:
    """All records of a file of JSON lines, typed; blank lines do not count.

    Raises:
        ResultsError: if the file cannot be read, or a line is no record of this schema; the message has file and line.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read as JSON lines of results: {error}") from error
    return [_parse(line, f"{path}, line {number}") for number, line in enumerate(lines, start=1) if line.strip()]


def _parse(line: str, where: str) -> Record:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise ResultsError(f"{where}: not JSON ({error}); repair or remove the line") from error
    if not isinstance(values, dict) or values.get("kind") not in KINDS:
        got = f"kind {values.get('kind')!r}" if isinstance(values, dict) else f"a JSON {type(values).__name__}"
        raise ResultsError(f"{where}: no benchmark result, got {got}; expected an object of kind {', '.join(KINDS)}")
    if (schema := values.pop("schema_version", None)) != SCHEMA_VERSION:
        raise ResultsError(
            f"{where}: results of schema_version {schema!r}; this version of grasp reads {SCHEMA_VERSION}. "
            "Measure again, or read them with the version that wrote them"
        )
    kind = values.pop("kind")
    try:
        record: Record = _typed(KINDS[kind], values, kind)
    except _MismatchError as error:
        raise ResultsError(f"{where}: {error}; expected the fields of docs/benchmarks.md") from error
    return record


class _MismatchError(ValueError):
    """A value is not of the type that the schema has for it."""


def _typed(expected: Any, value: Any, name: str) -> Any:
    """A JSON value as a type of the schema: a dataclass, tuple, mapping, union or plain value."""
    origin, arguments = get_origin(expected), get_args(expected)
    if is_dataclass(expected) and isinstance(expected, type):
        return _dataclass(expected, value, name)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        return _typed(next(each for each in arguments if each is not type(None)), value, name)
    if origin in (tuple, Sequence) and isinstance(value, list):
        return tuple(_typed(arguments[0], item, f"{name}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _typed(arguments[1], item, f"{name}[{key}]") for key, item in value.items()}
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(expected, type) and isinstance(value, expected) and (expected is bool or not isinstance(value, bool)):
        return value
    wanted = expected.__name__ if isinstance(expected, type) and origin is None else str(expected)
    raise _MismatchError(f"{name} is {value!r}, which is no {wanted}")


def _dataclass(expected: type, value: Any, name: str) -> Any:
    if not isinstance(value, Mapping):
        raise _MismatchError(f"{name} is {value!r}, which is no object")
    known = {each.name: each for each in fields(expected)}
    if unknown := sorted(set(value) - set(known)):
        raise _MismatchError(f"{name} has no field {unknown[0]!r}")
    required = {key for key, each in known.items() if each.default is MISSING and each.default_factory is MISSING}
    if missing := sorted(required - set(value)):
        raise _MismatchError(f"{name} lacks the field {missing[0]!r}")
    types_of = _hints(expected)
    return expected(**{key: _typed(types_of[key], item, f"{name}.{key}") for key, item in value.items()})


@cache
def _hints(expected: type) -> dict[str, Any]:
    return get_type_hints(expected)
