"""The record of ``grasp bench compress``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from grasp.bench.conditions import Conditions
from grasp.bench.schema import Record
from grasp.formatting import Column, layer_ranges, model_name, share, size

_ratio, _significant = "{:.2f}".format, "{:.4g}".format


@dataclass(frozen=True)
class CompressResult(Record):
    """One schedule of ``grasp bench compress``. Seconds are those of the attribution of all sequences.

    Attributes:
        model: name as it was given.
        layers: layers that are compressed.
        retain_ratio: share of the parameters of each matrix that is kept.
        schedule: ``sequential``, ``per-layer`` or ``single-sweep``.
        sweep_dtype: dtype of the package's sweeps. ``None`` for the model's own, fp32. Naive sweeps are fp32.
        batch_size: sequences at a time in the package's sweeps. Naive sweeps take one sequence at a time.
        sequences: number of calibration sequences.
        seq_len: tokens in each.
        timed_sequences: number of sequences of each sweep that are timed.
        extrapolated: whether seconds are extrapolated from the timed sequences to all.
        seconds: time of the package for all sequences, s.
        seconds_prefix: part of ``seconds`` for the stored hidden states, s.
        seconds_contraction: part of ``seconds`` for the products of weight gradients and factors, s.
        spread: slowest minus fastest batch over the median batch, for the worst sweep.
        naive_seconds: time of the naive implementation with the same schedule, s.
        naive_spread: like ``spread``.
        yardstick_seconds: time of the naive implementation with the paper's schedule (``sequential``), s.
        naive_svd_seconds: time of the naive decompositions, which the other seconds leave out, s.
        speedup: ``yardstick_seconds`` over ``seconds``.
        speedup_same_schedule: ``naive_seconds`` over ``seconds``.
        predicted_speedup: ``speedup`` as predicted by FLOPs.
        share_of_predicted: ``speedup`` over ``predicted_speedup``. ``None`` if the two sides differ in dtype or batch
            size.
        groups: number of singular groups that are kept.
        swaps: number of these that the two sides choose differently.
        largest_gap: largest difference in importance between swapped groups, over the importance of the last group
            that is kept.
        memory_bytes: bytes held above the loaded model for two batches, without decompositions. ``None`` if the
            system does not report it.
        memory_estimate: estimate of ``memory_bytes``.
        perplexity: perplexity of the model compressed with this schedule and ``sweep_dtype``. ``None`` without one, or
            if it is NaN or infinite.
        perplexity_fp32: the same with sweeps in the model's dtype.
        conditions: when and where.

    Example:
        >>> CompressResult.command.format(model="builtin")
        'grasp bench compress builtin -o compress.jsonl'
    """

    model: str
    layers: tuple[int, ...]
    retain_ratio: float
    schedule: str
    sweep_dtype: str | None
    batch_size: int
    sequences: int
    seq_len: int
    timed_sequences: int
    extrapolated: bool
    seconds: float
    seconds_prefix: float
    seconds_contraction: float
    spread: float
    naive_seconds: float
    naive_spread: float
    yardstick_seconds: float
    naive_svd_seconds: float
    speedup: float
    speedup_same_schedule: float
    predicted_speedup: float
    share_of_predicted: float | None
    groups: int
    swaps: int
    largest_gap: float
    memory_bytes: int | None
    memory_estimate: int
    perplexity: float | None
    perplexity_fp32: float | None
    conditions: Conditions

    kind: ClassVar[str] = "compress"
    title: ClassVar[str] = "The compression itself"
    case: ClassVar[tuple[Column, ...]] = (
        Column("model", "model", model_name),
        Column("layers", "layers", layer_ranges),
        Column("parameters kept", "retain_ratio", share),
        Column("sequences", "sequences"),
        Column("tokens in each", "seq_len"),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("schedule", "schedule"),
        Column("sweeps in", lambda result: result.sweep_dtype or "fp32"),
        Column("batch", "batch_size"),
        Column("timed", "timed_sequences"),
        Column("seconds", "seconds", _significant),
        Column("spread", "spread", share),
        Column("naive s", "yardstick_seconds", _significant),
        Column("× naive", "speedup", _ratio),
        Column("by FLOPs", "predicted_speedup", _ratio),
        Column("reached", "share_of_predicted", share),
        Column("× same schedule", "speedup_same_schedule", _ratio),
        Column("memory", "memory_bytes", size),
        Column("groups", "groups"),
        Column("swapped", "swaps"),
        Column("largest gap", "largest_gap", "{:.0e}".format),
        Column("perplexity", "perplexity", _ratio),
        Column("in fp32", "perplexity_fp32", _ratio),
    )
    legend: ClassVar[str] = (
        "Naive is the naive implementation with the paper's schedule; same schedule is the naive implementation with "
        "the schedule of the row. By FLOPs is the predicted speed-up, reached the share of it. Memory is above the "
        "loaded model. Swapped is the number of singular groups that the two sides choose differently. Block influence "
        "and decompositions are not measured: both sides need them alike."
    )
    missing: ClassVar[str] = "speed of the compression"
    command: ClassVar[str] = "grasp bench compress {model} -o compress.jsonl"

    def notes(self) -> Iterator[str]:
        """Conditions, whether seconds are extrapolated, and whether a perplexity is not a number."""
        yield from super().notes()
        if self.sweep_dtype is not None and None in (self.perplexity, self.perplexity_fp32):
            yield f"A perplexity of {self.schedule} is NaN or infinite."
        if self.extrapolated:
            yield f"Seconds are extrapolated from {self.timed_sequences} sequences of each sweep; the first warms up."
