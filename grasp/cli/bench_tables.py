"""Results of the benchmarks as tables and lines on stdout."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from grasp.bench.conditions import Conditions
from grasp.bench.results import CompressResult, ModelResult, NotMeasured, OpResult, Percentiles
from grasp.cli.console import print_table, print_text
from grasp.formatting import count, layer_ranges, size
from grasp_kernels.roofline import Card


def show_cards(cards: dict[str, Card], threads: int | None) -> None:
    """What limits the ops, by dtype."""
    for dtype, card in cards.items():
        where = card.name if threads is None else f"{card.name}, threads: {threads}"
        speeds = f"reads {card.bandwidth / 1e9:.1f} GB/s, multiplies {card.flops / 1e9:.0f} GFLOP/s in {dtype}"
        print_text(f"{where}: {speeds}")


def show_ops(results: Sequence[OpResult]) -> None:
    """The providers of one case."""
    first = results[0]
    print_table(
        ("provider", "median µs", "spread", "floor µs", "of floor", "× unfused", "× dense"),
        [
            (
                each.provider,
                f"{each.median_us:.1f}",
                f"{each.spread:.0%}",
                _or_blank(each.floor_us, ".1f"),
                _or_blank(each.share_of_floor, ".0%"),
                f"{each.speedup_over_unfused:.2f}",
                f"{each.speedup_over_dense:.2f}",
            )
            for each in results
        ],
        title=f"{first.op} {first.shape}, M = {first.rows}, {first.dtype}",
    )


def show_model(results: Sequence[ModelResult]) -> None:
    """The providers of one model at one batch size: prompt, decoding, sizes; tables of 80 columns."""
    first = results[0]
    print_table(
        ("ms: p50 p95 p99", "prefill", "floor", "share", "first token", "× dense"),
        [
            (
                each.provider,
                _milliseconds(each.prefill_ms),
                _or_blank(each.prefill_floor_ms, ".1f"),
                _or_blank(each.prefill_share_of_floor, ".0%"),
                _milliseconds(each.first_token_ms),
                f"{each.prefill_speedup_over_dense:.2f}",
            )
            for each in results
        ],
        title=f"{first.model}, {first.dtype}, layers {layer_ranges(first.layers)} by {first.factors} at "
        f"{first.retain_ratio:.0%}, batch {first.batch_size}, {first.prompt_tokens} + {first.new_tokens} tokens",
    )
    print_table(
        ("ms: p50 p95 p99", "per token", "floor", "share", "tokens/s", "IQR", "× dense"),
        [
            (
                each.provider,
                _milliseconds(each.inter_token_ms),
                _or_blank(each.inter_token_floor_ms, ".1f"),
                _or_blank(each.inter_token_share_of_floor, ".0%"),
                f"{each.decode_tokens_per_s:.1f}",
                f"{each.decode_spread:.0%}",
                f"{each.decode_speedup_over_dense:.2f}",
            )
            for each in results
        ],
    )
    print_table(
        ("", "parameters", "weights", "KV cache", "peak", "perplexity"),
        [
            (
                each.provider,
                count(each.parameters),
                size(each.weight_bytes),
                size(each.kv_cache_bytes),
                "?" if each.peak_memory_bytes is None else size(each.peak_memory_bytes),
                _or_blank(each.perplexity, ".1f"),
            )
            for each in results
        ],
    )


def show_model_notes(results: Sequence[ModelResult]) -> None:
    """What all numbers of a model mean."""
    first = results[0]
    show_conditions(first.conditions)
    apart = max(each.logits_difference or 0.0 for each in results)
    print_text(f"Logits of the low-rank models differ by at most {apart:.0e} from those of the reference backend.")
    print_text(
        "Each floor is what the weights' bytes or FLOPs cost at the speeds measured in this run, with the share that "
        "was reached; × dense is in time, repetition by repetition; IQR is the distance between the quartiles; peak is "
        "above the loaded weights."
    )
    if first.perplexity_text is not None:
        print_text(f"Perplexity on {first.perplexity_tokens} held-out tokens of {first.perplexity_text}.")
    if first.note:
        print_text(first.note)


def show_compress(results: Sequence[CompressResult]) -> None:
    """All schedules of one model, and how far the two sides agree."""
    first = results[0]
    print_table(
        ("schedule", "sweeps", "batch", "s", "spread", "naive s", "× naive", "by FLOPs", "reached", "MB"),
        [
            (
                each.schedule,
                each.sweep_dtype or "fp32",
                str(each.batch_size),
                f"{'~' if each.extrapolated else ''}{each.seconds:.1f}",
                f"{each.spread:.0%}",
                f"{'~' if each.extrapolated else ''}{each.yardstick_seconds:.1f}",
                f"{each.speedup:.2f}",
                f"{each.predicted_speedup:.2f}",
                _or_blank(each.share_of_predicted, ".0%"),
                "?" if each.memory_bytes is None else f"{each.memory_bytes / 1e6:.0f}",
            )
            for each in results
        ],
        title=f"{first.model}, layers {layer_ranges(first.layers)} at {first.retain_ratio:.0%}, "
        f"{first.sequences} × {first.seq_len} tokens",
    )
    show_conditions(first.conditions)
    for each in results:
        print_text(f"{each.schedule}: {_agreement(each)}")
    print_text("Not measured: block influence and decompositions, which both sides need alike.")
    if first.extrapolated:
        print_text(f"~ extrapolated from {first.timed_sequences} sequences of each sweep, the first of which warms up")


def show_conditions(now: Conditions) -> None:
    """Where and when."""
    threads = "" if now.threads is None else f", threads: {now.threads}"
    state = "" if now.commit is None else f", commit {now.commit[:9]}{' with changes' if now.dirty else ''}"
    print_text(f"\n{now.device}{threads}, torch {now.torch}{state}, {now.started}")


def show_left_out(records: Sequence[NotMeasured]) -> None:
    """What was not measured, each reason once."""
    for line in left_out_lines(records):
        print_text(line)


def left_out_lines(records: Sequence[NotMeasured]) -> Iterator[str]:
    """One line for each reason, with all places that it applies to."""
    by_reason: dict[tuple[bool, str, str | None, str], list[NotMeasured]] = {}
    for record in records:
        by_reason.setdefault((record.wrong, record.provider, record.op, record.not_measured), []).append(record)
    for (wrong, provider, op, reason), found in by_reason.items():
        what = provider if op is None else f"{provider} {op}"
        yield f"{'WRONG' if wrong else 'Not measured'}: {what} at {_places(found)}: {reason}"


def _places(records: Sequence[NotMeasured]) -> str:
    if records[0].benchmark == "model":
        return f"batch {', '.join(dict.fromkeys(str(record.batch_size) for record in records))}"
    by_shape: dict[str | None, list[NotMeasured]] = {}
    for record in records:
        by_shape.setdefault(record.shape, []).append(record)
    return "; ".join(
        f"{shape}, M = {', '.join(dict.fromkeys(str(record.rows) for record in found))}, "
        f"{', '.join(dict.fromkeys(str(record.dtype) for record in found))}"
        for shape, found in by_shape.items()
    )


def _agreement(result: CompressResult) -> str:
    if result.perplexity is not None:
        return f"perplexity {result.perplexity:.2f}, with sweeps in fp32 {result.perplexity_fp32:.2f}"
    where = f", importance apart by {result.largest_gap:.0e} of the last group kept" if result.swaps else ""
    return f"{result.swaps} of {result.groups} groups chosen differently{where}"


def _milliseconds(values: Percentiles) -> str:
    return " ".join(f"{each:.1f}" if each < 100 else f"{each:.0f}" for each in (values.p50, values.p95, values.p99))


def _or_blank(value: float | None, how: str) -> str:
    return "" if value is None else format(value, how)
