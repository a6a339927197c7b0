"""Time GRASP's attribution against its plain definition, ``grasp.compression.naive``.

Block influence and decompositions are left out on both sides. The sides take turns on the first batches of a sweep, on
models in the same state. If these are not the whole calibration set, the time is extrapolated and marked as such.
A result is reported only if both sides choose the same singular groups.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from transformers import PreTrainedModel

from grasp.bench.compress_records import CompressResult
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.memory import peak_bytes_above_now
from grasp.bench.providers import pick_layers
from grasp.bench.race import Race, race
from grasp.builtin import BUILTIN
from grasp.calibration import bos_for, builtin_text, token_batches, tokenize
from grasp.compress import compress_
from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import Estimate, estimate
from grasp.compression.job import CompressionJob
from grasp.config import GraspConfig
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_quietly
from grasp.method.ranks import redundant_layers
from grasp.method.schedules import SCHEDULES, plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder
from grasp.progress import Progress, no_progress, one_step
from grasp.statistics.gradients import gather_gradients
from grasp.statistics.redundancy import block_influence
from grasp.statistics.sweep import capture_prefix
from speedgate.timing import using_threads

_TIMED = [name for name in SCHEDULES if name != "progressive"]  # which needs a global budget
YARDSTICK = "sequential"  # the paper's schedule; speed-ups are over its naive run
HELD_OUT_WINDOWS = 16
MEMORY_BATCHES = 2


@dataclass(frozen=True)
class CompressRequest:
    """Settings of one run."""

    model: str = BUILTIN  # as for ``load_model``; run in fp32
    # layers to compress; ``None`` for the ``num_layers`` with the least influence
    layers: tuple[int, ...] | None = None
    num_layers: int = 6  # number of layers to compress
    retain_ratio: float = 0.3  # fraction of each matrix's parameters to keep
    schedules: Sequence[str] = ()  # schedules to time after the paper's; all without a global budget if empty
    sweep_dtype: str | None = None  # dtype of the package's sweeps; ``None`` for the model's own
    batch_size: int = 1  # sequences per batch in the package's sweeps
    num_samples: int = 24  # calibration sequences
    seq_len: int = 512  # tokens per sequence
    # batches to time in each sweep, the first of which warms up; ``None`` for the whole set
    timed_batches: int | None = 4
    device: str | None = None  # as for ``load_model``
    threads: int | None = None  # CPU threads; ``None`` for PyTorch's choice


@dataclass(frozen=True)
class AttributionSetting:
    """The loaded model, the calibration set, and the configuration of the package."""

    model: PreTrainedModel
    sequences: Tensor  # (sequences, seq_len)
    config: GraspConfig
    batch_size: int = 1
    timed_batches: int | None = None  # per sweep; None for all

    @property
    def batches(self) -> list[CalibrationBatch]:
        """The whole calibration set."""
        return [CalibrationBatch(part) for part in self.sequences.split(self.batch_size)]

    @property
    def sweeps(self) -> list[list[Target]]:
        """The linears of ``model`` by sweep."""
        return _sweeps(self.model, self.config)

    def estimate(self) -> Estimate:
        """The package's own estimate of the run."""
        count, length = self.sequences.shape
        model = self.model
        job = CompressionJob(
            model.config, self.config, model.dtype, first_device(model), num_samples=count, seq_len=length
        )
        return estimate(job, self.batch_size)

    def memory(self) -> tuple[int | None, int]:
        """Measured and estimated bytes above the loaded model, in the sweep through the most layers.

        Of ``MEMORY_BATCHES`` batches with their hidden states, without decompositions.
        """
        part = replace(self, sequences=self.sequences[: MEMORY_BATCHES * self.batch_size])
        dtype, sweeps, batches = self.config.sweep_dtype, self.sweeps, part.batches
        entries = {min(target.layer for target in targets) for targets in sweeps}

        def call() -> None:
            prefix = capture_prefix(self.model, batches, entries, dtype=dtype)
            gather_gradients(prefix, sweeps[-1])

        expected = replace(part.estimate().memory, decomposition=0, factors=0).peak
        return peak_bytes_above_now(call, first_device(self.model)), expected

    def race(self) -> Race:
        """Race both sides on copies of the model."""
        grasp, naive = copy.deepcopy(self.model), copy.deepcopy(self.model)
        return race(
            *(grasp, naive, self.batches[: self.timed_batches], _sweeps(grasp, self.config), self.config.retain_ratio),
            tokens=self.sequences.numel(),
            dtype=self.config.sweep_dtype,
        )

    def perplexity(self, held_out: Tensor, bos_token_id: int | None) -> float | None:
        """Perplexity of a copy compressed by ``compress_`` with all sequences; ``None`` if it is NaN or infinite."""
        model = copy.deepcopy(self.model)
        compress_(model, self.batches, self.config)
        result = perplexity(model, held_out, window=self.sequences.shape[1], bos_token_id=bos_token_id)
        return result.perplexity if math.isfinite(result.perplexity) else None


def _sweeps(model: PreTrainedModel, config: GraspConfig) -> list[list[Target]]:
    eligible, _ = eligible_targets(model)
    return plan_sweeps([target for layer in config.layers or () for target in eligible[layer]], config.schedule)


def to_result(
    name: str,
    setting: AttributionSetting,
    estimated: Estimate,
    run: Race,
    yardstick: Race,
    now: Conditions,
    *,
    memory: tuple[int | None, int],
    perplexities: tuple[float | None, float | None],
) -> CompressResult:
    """The record of one setting; ``yardstick`` ran with one sequence per batch."""
    count, length = setting.sequences.shape
    config, batches = setting.config, len(setting.batches)
    timed = len(run.grasp.sweeps[0]) * setting.batch_size
    flops = estimated.flops.prefix + estimated.flops.sweeps + estimated.flops.statistics
    predicted = yardstick.naive_flops * count / flops
    seconds, naive_seconds = run.grasp_seconds(batches), run.naive.total(batches)
    yardstick_seconds = yardstick.naive.total(count)
    return CompressResult(
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


def _settings(base: AttributionSetting, schedules: Sequence[str]) -> list[AttributionSetting]:
    """The yardstick's setting, then the requested ones."""
    first = replace(base, config=replace(base.config, schedule=YARDSTICK, sweep_dtype=None), batch_size=1)
    requested = [replace(base, config=replace(base.config, schedule=schedule)) for schedule in schedules]
    return [first, *(setting for setting in requested if (setting.config, setting.batch_size) != (first.config, 1))]


def run(request: CompressRequest, *, progress: Progress = no_progress) -> Iterator[CompressResult]:
    """Time the package's attribution against its plain definition: the paper's schedule first, then the requested ones.

    Each result is yielded before the next schedule is measured.

    Raises:
        WrongSelectionError: if rounding does not explain a difference of the chosen singular groups.
        GraspError, ValueError: from ``load_model``, ``token_batches``, ``pick_layers`` and ``GraspConfig``.
    """
    if request.num_samples % request.batch_size or request.num_samples < 2 * request.batch_size:
        raise ValueError(
            "num_samples must be a multiple of batch_size, and at least twice as much; "
            f"got {request.num_samples} and {request.batch_size}"
        )
    for schedule in request.schedules or _TIMED:  # raises if impossible
        GraspConfig(retain_ratio=request.retain_ratio, sweep_dtype=request.sweep_dtype, schedule=schedule)
    with using_threads(request.threads):
        yield from _run(request, progress)


def _run(request: CompressRequest, progress: Progress) -> Iterator[CompressResult]:
    loaded, tokenizer = load_quietly(request.model, dtype="float32", device=request.device, progress=progress)
    layers = pick_layers(request.layers, request.num_layers, len(decoder(loaded).layers))  # raises if impossible
    count, length = request.num_samples, request.seq_len
    text = builtin_text("calibration")
    drawn = token_batches(tokenizer, text, num_samples=count, seq_len=length, batch_size=count)[0].input_ids
    if request.layers is None:
        scores = block_influence(loaded, drawn.split(1), progress=progress)
        layers = sorted(redundant_layers(scores, request.num_layers))
    config = GraspConfig(layers=tuple(layers), retain_ratio=request.retain_ratio, sweep_dtype=request.sweep_dtype)
    base = AttributionSetting(loaded, drawn, config, request.batch_size, request.timed_batches)
    now = conditions(measure_card(device := first_device(loaded), loaded.dtype), device)
    held_out, bos = tokenize(tokenizer, builtin_text("evaluation"))[: HELD_OUT_WINDOWS * length], bos_for(tokenizer)
    settings = _settings(base, request.schedules or _TIMED)
    memory = [setting.memory() for setting in settings]  # before races, whose freed memory it could reuse
    yardstick: Race | None = None
    for setting, peak in zip(settings, memory, strict=True):
        with one_step(progress, f"timing {setting.config.schedule}"):
            race_run = setting.race()
        yardstick = yardstick or race_run
        perplexities: tuple[float | None, float | None] = (None, None)
        if setting.config.sweep_dtype is not None:
            fp32 = replace(setting, config=replace(setting.config, sweep_dtype=None))
            perplexities = setting.perplexity(held_out, bos), fp32.perplexity(held_out, bos)
        yield to_result(
            *(request.model, setting, setting.estimate(), race_run, yardstick, now),
            memory=peak,
            perplexities=perplexities,
        )
