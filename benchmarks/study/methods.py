"""The compression methods of the study, one row of ``METHODS`` each."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from benchmarks.study.cached_statistics import CachedStatistics
from benchmarks.study.linear_replacement import LINEAR_REPLACEMENT, Streams, capture_streams, replace_block_
from grasp.checkpoint.run_state import NoState
from grasp.compress import carry_out_
from grasp.compression.run import start_run
from grasp.config import GraspConfig
from grasp.method.ranks import redundant_layers
from grasp.model.batch import CalibrationBatch, as_batches
from grasp.model.layer_removal import remove_layers_
from grasp.model.running import casting
from grasp.model.size import model_size
from grasp.model.targets import decoder
from grasp.progress import no_progress
from grasp.statistics.processes import ALONE
from grasp.statistics.redundancy import block_influence

_GLOBAL: dict[str, Any] = {"allocation": "global", "schedule": "single-sweep"}
_SINGLE: dict[str, Any] = {"schedule": "single-sweep"}
_PROGRESSIVE: dict[str, Any] = {
    "basis": "kfac",
    "metric": "magnitude",
    "allocation": "global",
    "scope": "model",
    "schedule": "progressive",
}


class KnownBlockInfluence(NoState):
    """The state of a run whose block influence was measured before."""

    def __init__(self, scores: Sequence[float]) -> None:
        self.block_influence = scores


class CalibrationSet:
    """The calibration sequences of one seed, with the statistics of the dense model on them.

    Args:
        batches: the sequences of this seed.
        folder: cache of the statistics.
        dtype: the model runs over the calibration tokens in this dtype; ``None`` for its own.
    """

    def __init__(self, batches: list[CalibrationBatch], folder: Path, dtype: str | None) -> None:
        self.batches, self.dtype = batches, dtype
        self.statistics = CachedStatistics(folder, batches, dtype)
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


# Called with a model, which the method changes, the calibration set and the ratio of the whole model to remove.
Method = Callable[[PreTrainedModel, CalibrationSet, float], Outcome]


def compressed(**options: Any) -> Method:
    """A method that compresses with a configuration, as ``compress_`` does, from cached statistics."""

    def compress(model: PreTrainedModel, calibration: CalibrationSet, ratio: float) -> Outcome:
        config = GraspConfig(compression_ratio=ratio, sweep_dtype=calibration.dtype, **options)
        state = KnownBlockInfluence(calibration.block_influence(model))
        run = start_run(model, as_batches(calibration.batches), config, None, no_progress, state, ALONE)
        report = carry_out_(replace(run, gather=calibration.statistics))
        return Outcome(ranks={m.name: m.rank for m in report.modules if not m.reason}, scope=report.scope)

    return compress


def layers_removed(model: PreTrainedModel, calibration: CalibrationSet, ratio: float) -> Outcome:
    """Delete the fewest most redundant layers that remove at least ``ratio``."""
    layers = decoder(model).layers
    order = redundant_layers(calibration.block_influence(model), len(layers))
    removed = order[: _count(model, order, ratio)]
    remove_layers_(model, removed)
    return Outcome(removed_layers=removed)


def linear_replacement(model: PreTrainedModel, calibration: CalibrationSet, ratio: float) -> Outcome:
    """Replace the contiguous block that turns the hidden states least by a fitted linear map."""
    order = redundant_layers(calibration.block_influence(model), len(decoder(model).layers))
    streams = calibration.streams(model)
    return Outcome(removed_layers=replace_block_(model, streams, _count(model, order, ratio)))


def _count(model: PreTrainedModel, order: Sequence[int], ratio: float) -> int:
    """The number of layers to remove for a ratio of the whole model."""
    layers = decoder(model).layers
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in layers]
    least = 0.99 * ratio * model_size(model, layers).parameters
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
    "best": compressed(refit=True, **_PROGRESSIVE),
}
