"""Statistics of one calibration set, gathered once and kept on disk: many ways of compressing a model rest on them."""

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

from grasp.compression.candidates import hold_out
from grasp.compression.eligible import eligible_targets
from grasp.files import replacing
from grasp.method.basis import BASES
from grasp.method.metrics import METRICS
from grasp.method.svd import SVD, decompose
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.targets import Target
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.scores import Scored, Scores, decompositions_by, gather_scores
from grasp.statistics.sweep import capture_prefix


class Remembered:
    """Stands in for ``gather_scores`` where it is asked for all linears of the dense model at once.

    Covariances and first-order sums are kept in a folder, decompositions in memory. The covariances of the sequences
    that ``scope="auto"`` holds out are kept apart, so that one sweep serves with and without them.

    Attributes:
        seconds: what those statistics took, asked for since ``reset``, that were there already.

    Args:
        folder: made where there is none; it must belong to one model, text, seed and dtype.
        batches: all of the calibration set.
        dtype: see ``sweep``.
    """

    def __init__(self, folder: Path, batches: Sequence[CalibrationBatch], dtype: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._dtype, self._all = folder, dtype, len(batches)
        self._parts = dict(zip(("kept", "held-out"), hold_out(batches), strict=True))
        self._scored: dict[tuple[str, str, int, str], tuple[Scored, float]] = {}
        self._shared: dict[tuple[str, str, int], tuple[Scores, float]] = {}
        self.seconds = 0.0

    def reset(self) -> None:
        """Begin to count seconds anew."""
        self.seconds = 0.0

    def __call__(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        targets: Sequence[Target],
        prefix: Any,
        *,
        basis: str,
        metric: str,
        **_: Any,
    ) -> Scores:
        """As ``gather_scores``, for the whole model. The weights of ``model`` must be the dense ones."""
        key = (basis, metric, len(batches))
        if key not in self._shared:
            start = time.process_time()
            everything = [target for found in eligible_targets(model)[0].values() for target in found]
            scores, before = self._gather(model, everything, batches, basis, metric)
            self._shared[key] = scores, before + time.process_time() - start
            self.seconds += before
        else:
            self.seconds += self._shared[key][1]
        by_name = {target.name: make for target, make in self._shared[key][0].items()}
        return {t: partial(self._once, (*key, t.name), by_name[t.name]) for t in targets if t.name in by_name}

    def _once(self, key: tuple[str, str, int, str], make: Callable[[], Scored]) -> Scored:
        if key not in self._scored:
            start = time.process_time()
            self._scored[key] = make(), time.process_time() - start
            return self._scored[key][0]
        scored, seconds = self._scored[key]
        self.seconds += seconds
        return scored

    def _gather(
        self,
        model: PreTrainedModel,
        targets: Sequence[Target],
        batches: Sequence[CalibrationBatch],
        basis: str,
        metric: str,
    ) -> tuple[Scores, float]:
        """The scores, and what those of their statistics took that an earlier run gathered."""
        if (basis, metric) == ("plain", "magnitude"):
            return {t: partial(_by_magnitude, partial(decompose, dense_weight(t.module))) for t in targets}, 0.0
        if (basis, metric) == ("plain", "taylor"):
            return self._first_order(model, targets, batches)
        if metric != "magnitude":
            raise ValueError(f"the study remembers no scores of the basis {basis} and the metric {metric}")
        parts = list(self._parts) if len(batches) == self._all else ["kept"]
        found = [self._covariances(model, targets, part, BASES[basis].outputs) for part in parts]
        sums = _total([covariances for covariances, _ in found])
        makes = decompositions_by(sums)
        return {t: partial(_by_magnitude, make) for t, make in makes.items()}, sum(took for _, took in found)

    def _covariances(
        self, model: PreTrainedModel, targets: Sequence[Target], part: str, outputs: bool
    ) -> tuple[dict[Target, Covariance], float]:
        path = self._folder / f"covariances-{part}.safetensors"
        earlier = path.exists()
        if not earlier:
            start = time.process_time()
            batches = self._parts[part]
            prefix = capture_prefix(model, batches, {min(t.layer for t in targets)}, dtype=self._dtype)
            _save(path, gather_covariances(model, batches, targets, prefix, dtype=self._dtype), start)
        covariances, seconds = _load(path, targets, outputs)
        return covariances, seconds if earlier else 0.0

    def _first_order(
        self, model: PreTrainedModel, targets: Sequence[Target], batches: Sequence[CalibrationBatch]
    ) -> tuple[Scores, float]:
        path = self._folder / "taylor.safetensors"
        earlier = path.exists()
        if not earlier:
            start = time.process_time()
            prefix = capture_prefix(model, batches, {min(t.layer for t in targets)}, dtype=self._dtype)
            scores = gather_scores(model, batches, targets, prefix, basis="plain", metric="taylor", dtype=self._dtype)
            found = {target.name: make().importance for target, make in scores.items()}
            _write(path, found, {"seconds": time.process_time() - start})
        with safe_open(path, framework="pt") as file:
            importance = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            seconds = json.loads(file.metadata()["study"])["seconds"]
        return {
            t: partial(_with_importance, t, importance[t.name]) for t in targets if t.name in importance
        }, seconds if earlier else 0.0


def _by_magnitude(make: Callable[[], SVD]) -> Scored:
    svd = make()
    return Scored(svd, METRICS["magnitude"].score(svd.S, svd.S, svd.S))


def _with_importance(target: Target, importance: Tensor) -> Scored:
    return Scored(decompose(dense_weight(target.module), target.name), importance)


def _total(parts: Sequence[Mapping[Target, Covariance]]) -> dict[Target, Covariance]:
    """Sums over all parts; what several linears share stays one tensor."""
    inputs: dict[int, Tensor] = {}
    result: dict[Target, Covariance] = {}
    for target, first in parts[0].items():
        each = [part[target] for part in parts]
        if first.A is not None and id(first.A) not in inputs:
            inputs[id(first.A)] = sum((c.A for c in each[1:] if c.A is not None), first.A)
        B = None if first.B is None else sum((c.B for c in each[1:] if c.B is not None), first.B)
        result[target] = Covariance(inputs.get(id(first.A)), B, sum(c.tokens for c in each))
    return result


def _save(path: Path, covariances: Mapping[Target, Covariance], start: float) -> None:
    tensors: dict[str, Tensor] = {}
    owners: dict[int, str] = {}
    notes: dict[str, Any] = {"inputs": {}, "tokens": {}}
    for target, (A, B, tokens) in covariances.items():
        assert A is not None
        assert B is not None
        owner = owners.setdefault(id(A), target.name)
        tensors |= {f"A {owner}": A, f"B {target.name}": B}
        notes["inputs"][target.name], notes["tokens"][target.name] = owner, tokens
    _write(path, tensors, notes | {"seconds": time.process_time() - start})


def _load(path: Path, targets: Sequence[Target], outputs: bool) -> tuple[dict[Target, Covariance], float]:
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
