"""Time the attribution of GRASP against a naive one that follows the formulas (``benchmarks.naive``).

Block influence and decompositions are left out on both sides. A sweep is timed on its first batches, both sides in turn
on models in the same state; where those are not the whole set, its time is extrapolated, and marked as that. Nothing is
reported unless both sides choose the same singular groups.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from grasp.architecture import Target, decoder, first_device
from grasp.attribution import SCHEDULES, gather_gradients, plan_sweeps
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.memory import peak_bytes_above_now
from grasp.bench.model import parse_layers
from grasp.bench.race import Race, WrongSelectionError, race
from grasp.calibration import CalibrationBatch, bos_for, builtin_text, token_batches, tokenize
from grasp.compress import compress_, eligible_targets
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.estimate import Estimate, Job, estimate
from grasp.evaluate import perplexity
from grasp.loading import BUILTIN, load_model
from grasp.redundancy import block_influence
from grasp.selection import redundant_layers
from grasp.sweep import capture_prefix

YARDSTICK = "sequential"  # the schedule of the paper, whose naive run all speed-ups are over
HELD_OUT_WINDOWS = 16
MEMORY_BATCHES = 2


@dataclass(frozen=True)
class Result:
    """One schedule, one line of the output. Seconds are of the attribution of all sequences."""

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
class Setting:
    """What is run: the model as it was loaded, the calibration set, and how the package is configured."""

    model: PreTrainedModel
    sequences: Tensor  # (sequences, seq_len)
    config: GraspConfig
    batch_size: int = 1
    timed_batches: int | None = None  # None for all

    @property
    def batches(self) -> list[CalibrationBatch]:
        """The whole calibration set."""
        return [CalibrationBatch(part) for part in self.sequences.split(self.batch_size)]

    @property
    def sweeps(self) -> list[list[Target]]:
        """Linears of ``model`` that share a sweep."""
        return _sweeps(self.model, self.config)

    def estimate(self) -> Estimate:
        """What the package's own estimate says."""
        count, length = self.sequences.shape
        model = self.model
        job = Job(model.config, self.config, model.dtype, first_device(model), num_samples=count, seq_len=length)
        return estimate(job, self.batch_size)

    def memory(self) -> tuple[int | None, int]:
        """Bytes above the loaded model in the sweep that goes through the most layers: measured, and estimated.

        For ``MEMORY_BATCHES``, whose hidden states count; decompositions are left out.
        """
        part = replace(self, sequences=self.sequences[: MEMORY_BATCHES * self.batch_size])
        dtype, sweeps, batches = self.config.sweep_dtype, self.sweeps, part.batches
        entries = {min(target.layer for target in targets) for targets in sweeps}

        def call() -> None:
            prefix = capture_prefix(self.model, batches, entries, dtype=dtype)
            gather_gradients(self.model, batches, sweeps[-1], prefix, dtype=dtype)

        expected = replace(part.estimate().memory, svd=0, factors=0).peak
        return peak_bytes_above_now(call), expected

    def race(self) -> Race:
        """Both sides on copies of the model."""
        grasp, naive = copy.deepcopy(self.model), copy.deepcopy(self.model)
        return race(
            *(grasp, naive, self.batches[: self.timed_batches], _sweeps(grasp, self.config), self.config.retain_ratio),
            dtype=self.config.sweep_dtype,
        )

    def perplexity(self, held_out: Tensor, bos_token_id: int | None) -> float:
        """Of a copy that ``compress_`` has compressed with all sequences."""
        model = copy.deepcopy(self.model)
        compress_(model, self.batches, self.config)
        return perplexity(model, held_out, window=self.sequences.shape[1], bos_token_id=bos_token_id).perplexity


def _sweeps(model: PreTrainedModel, config: GraspConfig) -> list[list[Target]]:
    found, _ = eligible_targets(model)
    return plan_sweeps([target for layer in config.layers or () for target in found[layer]], config.schedule)


def to_result(
    name: str,
    setting: Setting,
    estimated: Estimate,
    run: Race,
    yardstick: Race,
    now: Conditions,
    *,
    memory: tuple[int | None, int],
    perplexities: tuple[float | None, float | None],
) -> Result:
    """One line of the output; ``yardstick`` was run a sequence at a time."""
    count, length = setting.sequences.shape
    config, batches = setting.config, len(setting.batches)
    timed = len(run.grasp.sweeps[0]) * setting.batch_size
    flops = estimated.flops.prefix + estimated.flops.sweeps + estimated.flops.statistics
    predicted = yardstick.naive_flops * count / flops
    seconds, naive_seconds = run.grasp_seconds(batches), run.naive.total(batches)
    yardstick_seconds = yardstick.naive.total(count)
    return Result(
        model=name,
        layers=config.layers or (),
        retain_ratio=config.retain_ratio,
        schedule=config.schedule,
        sweep_dtype=config.sweep_dtype,
        batch_size=setting.batch_size,
        sequences=count,
        seq_len=length,
        timed_sequences=timed,
        extrapolated=timed < count,
        seconds=seconds,
        seconds_prefix=run.prefix.total(batches),
        seconds_contraction=run.contraction_seconds,
        spread=run.grasp.spread,
        naive_seconds=naive_seconds,
        naive_spread=run.naive.spread,
        yardstick_seconds=yardstick_seconds,
        naive_svd_seconds=run.naive_svd_seconds,
        speedup=yardstick_seconds / seconds,
        speedup_same_schedule=naive_seconds / seconds,
        predicted_speedup=predicted,
        share_of_predicted=None
        if config.sweep_dtype or setting.batch_size > 1
        else yardstick_seconds / seconds / predicted,
        groups=run.groups,
        swaps=run.swaps,
        largest_gap=run.largest_gap,
        memory_bytes=memory[0],
        memory_estimate=memory[1],
        perplexity=perplexities[0],
        perplexity_fp32=perplexities[1],
        conditions=now,
    )


def result_table(results: Sequence[Result]) -> Table:
    """All schedules of one model."""
    first = results[0]
    table = Table(
        title=f"{first.model}, layers {', '.join(map(str, first.layers))} at {first.retain_ratio:.0%}, "
        f"{first.sequences} × {first.seq_len} tokens",
        title_justify="left",
    )
    table.add_column("schedule", no_wrap=True)
    for heading in ("sweeps", "batch", "s", "naive s", "× naive", "by FLOPs", "reached", "MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for each in results:
        mark = "~" if each.extrapolated else ""
        table.add_row(
            each.schedule,
            each.sweep_dtype or "fp32",
            str(each.batch_size),
            f"{mark}{each.seconds:.1f}",
            f"{mark}{each.yardstick_seconds:.1f}",
            f"{each.speedup:.2f}",
            f"{each.predicted_speedup:.2f}",
            "" if each.share_of_predicted is None else f"{each.share_of_predicted:.0%}",
            "?" if each.memory_bytes is None else f"{each.memory_bytes / 1e6:.0f}",
        )
    return table


def _settings(base: Setting, schedules: Sequence[str]) -> list[Setting]:
    """What is asked for, after the yardstick."""
    first = replace(base, config=replace(base.config, schedule=YARDSTICK, sweep_dtype=None), batch_size=1)
    asked = [replace(base, config=replace(base.config, schedule=schedule)) for schedule in schedules]
    return [first, *(setting for setting in asked if (setting.config, setting.batch_size) != (first.config, 1))]


def main(
    model: Annotated[str, typer.Argument(help="Hub name, folder, GGUF file, or builtin.")] = BUILTIN,
    num_layers: Annotated[int, typer.Option(min=1, help="Compress so many, those with the least influence.")] = 6,
    layers: Annotated[str | None, typer.Option(help="These instead, as 3,4,5.")] = None,
    retain_ratio: Annotated[float, typer.Option(min=1e-6, max=1, help="Parameters kept of each matrix.")] = 0.3,
    schedule: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(SCHEDULES)}; else all.")] = None,
    sweep_dtype: Annotated[str | None, typer.Option(help="bfloat16, or the model's own if left out.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Sequences at a time in the package's sweeps.")] = 1,
    num_samples: Annotated[int, typer.Option(min=2, help="Calibration sequences.")] = 24,
    seq_len: Annotated[int, typer.Option(min=2)] = 512,
    timed_batches: Annotated[int, typer.Option(min=2, help="Of each sweep; the first warms up.")] = 4,
    full: Annotated[
        bool, typer.Option("--full", help="Time the whole calibration set; nothing is extrapolated.")
    ] = False,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 2,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time the package's attribution against a naive one: the paper's schedule first, then those asked for.

    Example: python -m grasp.bench.compress --layers 22,23,24,25,26,27 -o compress.jsonl
    """
    torch.set_num_threads(threads)
    console = Console()
    try:
        loaded, tokenizer = load_model(model, dtype="float32")
        drawn = token_batches(
            tokenizer, builtin_text("calibration"), num_samples=num_samples, seq_len=seq_len, batch_size=num_samples
        )
        if layers is None:
            scores = block_influence(loaded, drawn[0].input_ids.split(1))
            chosen = sorted(redundant_layers(scores, num_layers))
        else:
            chosen = parse_layers(layers, num_layers, len(decoder(loaded).layers))
        config = GraspConfig(layers=tuple(chosen), retain_ratio=retain_ratio, sweep_dtype=sweep_dtype)
        base = Setting(loaded, drawn[0].input_ids, config, batch_size, None if full else timed_batches)
        settings = _settings(base, schedule or list(SCHEDULES))
        estimates = [setting.estimate() for setting in settings]
    except (GraspError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    now = conditions(measure_card(device := first_device(loaded), loaded.dtype), device)
    memory = [setting.memory() for setting in settings]
    try:
        runs = [setting.race() for setting in settings]
    except WrongSelectionError as error:
        console.print(f"WRONG: {error}; nothing is reported", highlight=False)
        raise typer.Exit(1) from error
    held_out = tokenize(tokenizer, builtin_text("evaluation"))[: HELD_OUT_WINDOWS * seq_len]
    results = []
    for setting, estimated, run, peak in zip(settings, estimates, runs, memory, strict=True):
        perplexities: tuple[float | None, float | None] = (None, None)
        if setting.config.sweep_dtype is not None:
            fp32 = replace(setting, config=replace(setting.config, sweep_dtype=None))
            bos = bos_for(tokenizer)
            perplexities = setting.perplexity(held_out, bos), fp32.perplexity(held_out, bos)
        results.append(to_result(model, setting, estimated, run, runs[0], now, memory=peak, perplexities=perplexities))
    console.print(f"{now.device}, threads: {now.threads}. Block influence and decompositions are left out.")
    console.print(result_table(results))
    for each in results:
        console.print(f"{each.schedule}: {_agreement(each)}", highlight=False)
    if not full:
        console.print(f"~ extrapolated from the medians of {timed_batches - 1} batches of each sweep")
    if output is not None:
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(each)) + "\n" for each in results)


def _agreement(result: Result) -> str:
    if result.perplexity is not None:
        return f"perplexity {result.perplexity:.2f}, with sweeps in fp32 {result.perplexity_fp32:.2f}"
    where = f", importance apart by {result.largest_gap:.0e} of the last group kept" if result.swaps else ""
    return f"{result.swaps} of {result.groups} groups chosen differently{where}"


if __name__ == "__main__":
    typer.run(main)
