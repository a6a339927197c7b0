"""Statistics of one calibration set, gathered once and cached on disk for many compressions of one model."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grasp.compression.eligible import eligible_targets
from grasp.files import replacing
from grasp.method.basis import BASES
from grasp.method.svd import decompose
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import Target
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.scores import Scored, Scores, decompositions_by, gather_scores, score_by_magnitude
from grasp.statistics.sweep import Prefix, capture_prefix


class CachedStatistics:
    """Replaces ``gather_scores`` for the linears of the dense model.

    Covariances and first-order sums are cached in a folder, decompositions in memory.

    Attributes:
        seconds: CPU seconds that the statistics used since ``reset`` took when they were gathered.

    Args:
        folder: created if missing; one folder per model, text, seed and dtype.
        batches: the whole calibration set.
        dtype: see ``sweep``.
    """

    def __init__(self, folder: Path, batches: Sequence[CalibrationBatch], dtype: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._batches, self._dtype = folder, batches, dtype
        self._scored: dict[tuple[str, str, str], tuple[Scored, float]] = {}
        self._scores: dict[tuple[str, str], tuple[Scores, float]] = {}
        self.seconds = 0.0

    def reset(self) -> None:
        """Set ``seconds`` to 0."""
        self.seconds = 0.0

    def __call__(
        self,
        prefix: Prefix,
        targets: Sequence[Target],
        *,
        basis: str,
        metric: str,
        **_: Any,
    ) -> Scores:
        """``gather_scores`` of the dense model; the weights of the model of ``prefix`` must be the dense ones."""
        model, batches = prefix.model, len(prefix.batches)
        if batches != len(self._batches):
            raise ValueError(f"expected all {len(self._batches)} batches of the calibration set, got {batches}")
        key = (basis, metric)
        if key not in self._scores:
            start = time.process_time()
            linears = [target for layer in eligible_targets(model)[0].values() for target in layer]
            scores, earlier = self._gather(model, linears, basis, metric)
            self._scores[key] = scores, earlier + time.process_time() - start
            self.seconds += earlier
        else:
            self.seconds += self._scores[key][1]
        by_name = {target.name: score for target, score in self._scores[key][0].items()}
        return {t: partial(self._cached, (*key, t.name), by_name[t.name]) for t in targets if t.name in by_name}

    def _cached(self, key: tuple[str, str, str], score: Callable[[], Scored]) -> Scored:
        if key not in self._scored:
            start = time.process_time()
            self._scored[key] = score(), time.process_time() - start
            return self._scored[key][0]
        scored, seconds = self._scored[key]
        self.seconds += seconds
        return scored

    def _gather(
        self, model: PreTrainedModel, targets: Sequence[Target], basis: str, metric: str
    ) -> tuple[Scores, float]:
        """The scores, and the seconds that an earlier run took to gather their statistics."""
        if (basis, metric) == ("plain", "magnitude"):
            return score_by_magnitude({t: partial(decompose, dense_weight(t.module)) for t in targets}), 0.0
        if (basis, metric) == ("plain", "taylor"):
            return self._first_order(model, targets)
        if metric != "magnitude":
            raise ValueError(f"the study has no cached scores of the basis {basis!r} and the metric {metric!r}")
        covariances, earlier = self._covariances(model, targets, outputs=BASES[basis].outputs)
        return score_by_magnitude(decompositions_by(covariances)), earlier

    def _covariances(
        self, model: PreTrainedModel, targets: Sequence[Target], *, outputs: bool
    ) -> tuple[dict[Target, Covariance], float]:
        path = self._folder / "covariances.safetensors"
        is_cached = path.exists()
        if not is_cached:
            start = time.process_time()
            prefix = capture_prefix(model, self._batches, {min(t.layer for t in targets)}, dtype=self._dtype)
            _save(path, gather_covariances(prefix, targets), start)
        covariances, seconds = _load(path, targets, outputs=outputs)
        return covariances, seconds if is_cached else 0.0

    def _first_order(self, model: PreTrainedModel, targets: Sequence[Target]) -> tuple[Scores, float]:
        path = self._folder / "taylor.safetensors"
        is_cached = path.exists()
        if not is_cached:
            start = time.process_time()
            prefix = capture_prefix(model, self._batches, {min(t.layer for t in targets)}, dtype=self._dtype)
            gathered = gather_scores(prefix, targets, basis="plain", metric="taylor")
            importance = {target.name: score().importance for target, score in gathered.items()}
            _write(path, importance, {"seconds": time.process_time() - start})
        with safe_open(path, framework="pt") as file:
            importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seconds = json.loads(file.metadata()["study"])["seconds"]
        scores = {t: partial(_with_importance, t, importance[t.name]) for t in targets if t.name in importance}
        return scores, seconds if is_cached else 0.0


def _with_importance(target: Target, importance: Tensor) -> Scored:
    return Scored(decompose(dense_weight(target.module), target.name), importance)


def _save(path: Path, covariances: Mapping[Target, Covariance], start: float) -> None:
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    notes: dict[str, Any] = {"inputs": {}, "tokens": {}}
    for target, (A, B, tokens) in covariances.items():
        assert B is not None
        owner = owners.setdefault(id(A), target.name)
        tensors |= {f"A {owner}": A, f"B {target.name}": B}
        notes["inputs"][target.name], notes["tokens"][target.name] = owner, tokens
    _write(path, tensors, notes | {"seconds": time.process_time() - start})


def _load(path: Path, targets: Sequence[Target], *, outputs: bool) -> tuple[dict[Target, Covariance], float]:
    with safe_open(path, framework="pt") as file:
        notes = json.loads(file.metadata()["study"])
        inputs = {owner: file.get_tensor(f"A {owner}") for owner in set(notes["inputs"].values())}
        return {
            t: Covariance(
                inputs[notes["inputs"][t.name]],
                file.get_tensor(f"B {t.name}") if outputs else None,
                notes["tokens"][t.name],
            )
            for t in targets
            if t.name in notes["tokens"]
        }, notes["seconds"]


def _write(path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
    with replacing(path) as temporary:
        save_file(
            {name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"study": json.dumps(notes)}
        )
