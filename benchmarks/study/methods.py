"""The compression methods of the study, one row of ``METHODS`` each."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.study.cached_statistics import CachedStatistics
from benchmarks.study.lems import lems_
from benchmarks.study.linear_replacement import LINEAR_REPLACEMENT, Streams, capture_streams, replace_block_
from grasp.checkpoint.run_state import NoState
from grasp.compress import carry_out_
from grasp.compression.run import start_run
from grasp.config import GraspConfig
from grasp.method.basis import BASES
from grasp.method.ranks import redundant_layers
from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.layer_removal import remove_layers_
from grasp.model.running import casting
from grasp.model.size import model_size
from grasp.model.targets import decoder
from grasp.progress import Progress
from grasp.recovery import RecoveryConfig, recover_
from grasp.statistics.processes import ALONE
from grasp.statistics.redundancy import block_influence
from grasp.training_data import TrainingSequence

_GLOBAL: dict[str, Any] = {"allocation": "global", "schedule": "single-sweep"}
PASSES = 3  # of the training of ``recovered``
_SINGLE: dict[str, Any] = {"schedule": "single-sweep"}
_PROGRESSIVE: dict[str, Any] = {
    "basis": "kfac",
    "metric": "magnitude",
    "allocation": "global",
    "scope": "model",
    "schedule": "progressive",
}


class CalibrationSet:
    """The calibration sequences of one seed, with the statistics of the dense model on them.

    Args:
        batches: the sequences of this seed.
        first_tokens: sequences of two tokens, which methods with covariances see as well.
        held_out: other sequences, an eighth as many, which decide between the candidates of ``best``.
        folder: cache of the statistics.
        dtype: the model runs over the calibration tokens in this dtype; ``None`` for its own.
    """

    def __init__(
        self,
        batches: list[CalibrationBatch],
        first_tokens: list[CalibrationBatch],
        held_out: list[CalibrationBatch],
        folder: Path,
        dtype: str | None,
    ) -> None:
        self.batches, self.first_tokens, self.held_out = batches, first_tokens, held_out
        self.folder, self.dtype = folder, dtype
        folder.mkdir(parents=True, exist_ok=True)
        self.statistics = CachedStatistics(folder)
        self._block_influence = folder / "block_influence.json"
        self._streams: Streams | None = None

    def block_influence(self, dense: PreTrainedModel) -> list[float]:
        """Block influence of the layers of the dense model, measured once."""
        if not self._block_influence.exists():
            with casting(dense, self.dtype):
                scores = block_influence(dense, self.batches)
            self._block_influence.write_text(json.dumps(scores), encoding="utf-8")
        return list(json.loads(self._block_influence.read_text(encoding="utf-8")))

    def streams(self, dense: PreTrainedModel) -> Streams:
        """Hidden states of the dense model, which linear replacement needs; captured once."""
        if self._streams is None:
            self._streams = capture_streams(dense, self.batches, self.dtype)
        return self._streams


@dataclass(frozen=True)
class Outcome:
    """The changes that a method made to a model."""

    removed_layers: tuple[int, ...] = ()
    ranks: dict[str, int] = field(default_factory=dict)  # by module
    scope: str | None = None
    pivoted: bool = False  # the form of the low-rank linears
    channels: dict[str, int] = field(default_factory=dict)  # of the MLPs that have lost some
    held_out_loss: Mapping[str, float] = field(default_factory=dict)  # as in the report


@dataclass(frozen=True)
class Job:
    """What a method is given besides the model."""

    calibration: CalibrationSet
    ratio: float  # fraction of the parameters of the whole model to remove
    state: NoState  # of a compression, which an interrupted one resumes from
    memory: int | None  # bytes that a compression may take above the loaded model; ``None`` for 0.9 of what is free
    progress: Progress  # called as ``progress(step, done, total)``


Method = Callable[[PreTrainedModel, Job], Outcome]  # changes the dense model that it is given


def compressed(*, chooses: bool = False, **options: Any) -> Method:
    """A method that compresses with a configuration, as ``compress_`` does, from cached statistics.

    Args:
        chooses: whether held-out sequences decide between the candidates.
        options: of the configuration.
    """

    def compress(model: PreTrainedModel, job: Job) -> Outcome:
        calibration, state = job.calibration, job.state
        config = GraspConfig(compression_ratio=job.ratio, sweep_dtype=calibration.dtype, **options)
        influence = calibration.block_influence(model)
        seen = [*calibration.batches, *(calibration.first_tokens if BASES[config.basis].inputs else ())]
        batches = as_batches(seen)
        held_out = calibration.held_out if chooses else []
        run = start_run(
            *(model, batches, config, None, job.progress, state, ALONE), held_out=held_out, memory=job.memory
        )
        state.block_influence = influence
        report = carry_out_(replace(run, gather=calibration.statistics))
        ranks = {module.name: module.rank for module in report.modules if not module.reason}
        channels = {path: after for path, (_, after) in report.channels.items()}
        pivoted = config.form == "pivoted"
        return Outcome(report.removed_layers, ranks, report.scope, pivoted, channels, report.held_out_loss)

    return compress


def recovered(model: PreTrainedModel, job: Job) -> Outcome:
    """``best``, whose factors then learn the dense model's predictions of the calibration text in three passes."""
    dense, calibration = copy.deepcopy(model), job.calibration
    outcome = METHODS["best"](model, job)
    training, held_out = (list(_sequences(batches)) for batches in (calibration.batches, calibration.held_out))
    tokens = PASSES * sum(len(sequence.input_ids) for sequence in training)
    if outcome.ranks:  # else nothing is low-rank, such as where layers were removed
        recover_(model, training, held_out, RecoveryConfig(tokens=tokens), teacher=dense, progress=job.progress)
    return outcome


def _sequences(batches: Iterable[CalibrationBatch]) -> Iterator[TrainingSequence]:
    for batch in batches:
        yield from (TrainingSequence(row, torch.arange(len(row)) > 0) for row in batch.input_ids)


def layers_removed(model: PreTrainedModel, job: Job) -> Outcome:
    """Delete the fewest most redundant layers that remove at least ``ratio``."""
    layers = decoder(model).layers
    order = redundant_layers(job.calibration.block_influence(model), len(layers))
    removed = order[: _count(model, order, job.ratio)]
    remove_layers_(model, removed)
    return Outcome(removed_layers=removed)


def linear_replacement(model: PreTrainedModel, job: Job) -> Outcome:
    """Replace the contiguous block that turns the hidden states least by a fitted linear map."""
    order = redundant_layers(job.calibration.block_influence(model), len(decoder(model).layers))
    streams = job.calibration.streams(model)
    return Outcome(removed_layers=replace_block_(model, streams, _count(model, order, job.ratio)))


def lems(model: PreTrainedModel, job: Job) -> Outcome:
    """Our own implementation of LEMS."""
    calibration, saving = job.calibration, job.ratio * model_size(model).parameters
    file, batches = calibration.folder / "lems.json", as_batches(calibration.batches)
    return Outcome(ranks=lems_(model, batches, saving, file, dtype=calibration.dtype, progress=job.progress))


def _count(model: PreTrainedModel, order: Sequence[int], ratio: float) -> int:
    """The number of layers to remove for a ratio of the whole model."""
    layers = decoder(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    least = 0.99 * ratio * model_size(model).parameters
    return next(n for n in range(len(order) + 1) if sum(sizes[i] for i in order[:n]) >= least)


METHODS: dict[str, Method] = {
    "layers removed": layers_removed,
    LINEAR_REPLACEMENT: linear_replacement,
    "plain SVD": compressed(metric="magnitude", **_SINGLE),
    "GRASP, one sweep": compressed(**_SINGLE),
    "uniform whitened": compressed(basis="whitened", metric="magnitude", scope="model", **_SINGLE),
    "uniform kfac": compressed(basis="kfac", metric="magnitude", scope="model", **_SINGLE),
    "global kfac, redundant": compressed(basis="kfac", metric="magnitude", scope="redundant", **_GLOBAL),
    "global kfac, model": compressed(basis="kfac", metric="magnitude", scope="model", **_GLOBAL),
    "global kfac, model, refit": compressed(basis="kfac", metric="magnitude", scope="model", refit=True, **_GLOBAL),
    "progressive kfac, model": compressed(**_PROGRESSIVE),
    "LEMS": lems,
    "best, factored": compressed(refit=True, **_PROGRESSIVE),
    "best": compressed(chooses=True, refit=True, form="pivoted", **_PROGRESSIVE),
    "best, recovered": recovered,
}
