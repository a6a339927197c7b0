"""The tables of measured results on the page of ``grasp report``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import attrgetter
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from grasp.errors import ResultsError
from grasp.formatting import count, layer_ranges, share, size
from grasp.reporting.figure_data import state
from grasp.reporting.html import Column, paragraph, table

if TYPE_CHECKING:
    from grasp.bench.results import Record


def _fixed(digits: int) -> Callable[[Any], str]:
    return lambda value: f"{value:.{digits}f}"


def _significant(value: Any) -> str:
    return f"{value:.4g}"


def _times(value: Any) -> str:
    return f"{value:.2f}×"


def _column(heading: str, path: str, number: Callable[[Any], str] | None = None) -> Column:
    return Column(heading, attrgetter(path), number)


TITLES = {
    "model": "The whole model",
    "study": "Methods and sizes",
    "op": "The ops",
    "compress": "The compression itself",
    "not_measured": "Not measured, and why",
}
# Kind of record → what it is about, and the command that writes such records of a model and a folder to KIND.jsonl.
HOW = {
    "model": ("speed and memory of the whole model", "grasp bench model {model} --compressed {folder} -o model.jsonl"),
    "study": (
        "perplexity of other methods and sizes",
        "python -m benchmarks.study.quality -o study.jsonl --model {model}",
    ),
    "op": ("speed of the ops", "grasp bench ops -o op.jsonl"),
    "compress": ("speed of the compression", "grasp bench compress {model} -o compress.jsonl"),
}

COLUMNS: dict[str, tuple[Column, ...]] = {
    "model": (
        _column("provider", "provider"),
        _column("factors", "factors"),
        Column("layers", lambda line: layer_ranges(line.layers)),
        _column("dtype", "dtype"),
        _column("batch", "batch_size", str),
        _column("prompt", "prompt_tokens", str),
        _column("parameters", "parameters", count),
        _column("weights", "weight_bytes", size),
        _column("KV cache", "kv_cache_bytes", size),
        _column("peak above weights", "peak_memory_bytes", size),
        _column("first token p50 ms", "first_token_ms.p50", _significant),
        _column("p95", "first_token_ms.p95", _significant),
        _column("p99", "first_token_ms.p99", _significant),
        _column("each further p50 ms", "inter_token_ms.p50", _significant),
        _column("p95", "inter_token_ms.p95", _significant),
        _column("p99", "inter_token_ms.p99", _significant),
        _column("of floor", "inter_token_share_of_floor", share),
        _column("prefill tokens/s", "prefill_tokens_per_s", _fixed(1)),
        _column("× dense", "prefill_speedup_over_dense", _times),
        _column("decode tokens/s", "decode_tokens_per_s", _fixed(1)),
        _column("× dense", "decode_speedup_over_dense", _times),
        _column("spread", "decode_spread", share),
        _column("perplexity", "perplexity", _significant),
        _column("note", "note"),
    ),
    "study": (
        _column("method", "method"),
        _column("asked for", "ratio", share),
        _column("removed", "removed", share),
        _column("seed", "seed", str),
        _column("parameters", "parameters", count),
        _column("perplexity", "perplexity", _significant),
        _column("nats over dense", "excess", _fixed(3)),
        _column("CPU seconds", "cpu_seconds", _fixed(0)),
    ),
    "op": (
        _column("op", "op"),
        _column("provider", "provider"),
        _column("shape", "shape"),
        _column("rows", "rows", str),
        _column("dtype", "dtype"),
        _column("median µs", "median_us", _significant),
        _column("spread", "spread", share),
        _column("floor µs", "floor_us", _significant),
        _column("of floor", "share_of_floor", share),
        _column("× unfused", "speedup_over_unfused", _times),
        _column("× dense", "speedup_over_dense", _times),
    ),
    "compress": (
        _column("schedule", "schedule"),
        Column("layers", lambda line: layer_ranges(line.layers)),
        _column("sweeps in", "sweep_dtype"),
        _column("batch", "batch_size", str),
        _column("sequences", "sequences", str),
        _column("tokens each", "seq_len", str),
        _column("seconds", "seconds", _significant),
        Column("extrapolated", lambda line: "yes" if line.extrapolated else "no"),
        _column("naive, same schedule", "naive_seconds", _significant),
        _column("speed-up", "speedup_same_schedule", _times),
        _column("over naive, paper's schedule", "speedup", _times),
        _column("memory above model", "memory_bytes", size),
    ),
    "not_measured": (
        _column("benchmark", "benchmark"),
        _column("provider", "provider"),
        _column("op", "op"),
        _column("shape", "shape"),
        _column("rows", "rows", str),
        _column("dtype", "dtype"),
        _column("batch", "batch_size", str),
        Column("result", lambda line: "wrong" if line.wrong else "none"),
        _column("reason", "not_measured"),
    ),
}


def result_table(kind: str, records: Sequence[Record]) -> str:
    """All records of a kind as a table, below it the conditions of their measurement; nothing if there are none."""
    lines = [record for record in records if record.kind == kind]
    if not lines:
        return ""
    conditions = dict.fromkeys(state(found) for line in lines if (found := getattr(line, "conditions", None)))
    measured = paragraph(f"Measured on: {' · '.join(conditions)}.") if conditions else ""
    return table(TITLES[kind], COLUMNS[kind], lines) + measured


def require_same_model(records: Sequence[Record], name: str | None, own: str, parameters: int, path: object) -> None:
    """Refuse results of another model than the one that was compressed; those of ops are of no model.

    Args:
        records: of one file.
        name: of the model that was compressed, where it is known; files and folders without those they lie in.
        own: name of the compressed checkpoint.
        parameters: of the model before.
        path: of the file, for the message.

    Raises:
        ResultsError: with both names, or both sizes.
    """
    for record in records:
        found = _model(record)
        if found is None:
            continue
        last = PurePath(found).name
        if name is not None and last not in (PurePath(name).name, own):
            raise ResultsError(f"{path} has results of {found}, but {own} was made from {name}; leave that file out")
        dense = "dense" in (getattr(record, "provider", ""), getattr(record, "method", ""))
        if dense and last != own and record.parameters != parameters:  # type: ignore[union-attr]  # both kinds have it
            raise ResultsError(
                f"{path} has results of {found} with {record.parameters} parameters, but {own} was made from a "  # type: ignore[union-attr]
                f"model with {parameters}; leave that file out"
            )


def _model(record: Record) -> str | None:
    if record.kind == "study":
        return record.setting.model  # type: ignore[union-attr]  # by its kind
    return getattr(record, "model", None) if record.kind != "op" else None
