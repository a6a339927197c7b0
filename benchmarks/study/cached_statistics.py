"""Singular groups of the dense model, scored once per calibration set and cached on disk for many compressions."""

from __future__ import annotations

import json
import time
from collections.abc import Collection
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp.compression.eligible import eligible_targets
from grasp.files import replacing
from grasp.method.ranks import break_even_rank
from grasp.method.svd import SVD
from grasp.model.targets import Target
from grasp.statistics.scores import Score, Scored, Scores, gather_scores
from grasp.statistics.sweep import Prefix, sweep

_FACTORS = SVD._fields


class CachedStatistics:
    """Replaces ``gather_scores`` for the linears of the dense model.

    The groups of each linear are in a file, up to the break-even rank: it serves every compression ratio.

    Attributes:
        seconds: CPU seconds that earlier calls took to score the groups that were read from files.

    Args:
        folder: of the files; one folder per model, calibration set and dtype.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seconds = 0.0

    def __call__(
        self, prefix: Prefix, targets: Collection[Target], *, basis: str, metric: str, layers: range, **options: Any
    ) -> Scores:
        """``gather_scores`` of the dense model; the weights of the model of ``prefix`` must be the dense ones."""
        folder = self._folder / f"{basis}-{metric}"
        folder.mkdir(parents=True, exist_ok=True)
        missing = [target for target in targets if not _file(folder, target).exists()]
        if missing:
            start = time.process_time()
            scores = gather_scores(prefix, missing, basis=basis, metric=metric, layers=layers, **options)
            share = (time.process_time() - start) / len(missing)
        else:
            scores, share = {}, 0.0
            eligible, below = eligible_targets(prefix.model)[0], range(min(prefix.hidden), layers.start)
            if not all(_file(folder, target).exists() for layer in below for target in eligible[layer]):
                sweep(prefix, (), lambda call: None, layers=layers)  # the layers below need the gradient
        cached = {target: partial(self._read, _file(folder, target)) for target in targets if target not in missing}
        return cached | {t: partial(_write, _file(folder, t), score, share) for t, score in scores.items()}

    def _read(self, file: Path, weight: Tensor, rank: int | None) -> Scored:
        with safe_open(file, framework="pt") as tensors:
            self.seconds += json.loads(tensors.metadata()["study"])["seconds"]
            svd = SVD(*(tensors.get_tensor(name) for name in _FACTORS))
            return Scored(svd, tensors.get_tensor("importance"))


def _write(file: Path, score: Score, share: float, weight: Tensor, rank: int | None) -> Scored:
    """Score the groups of a linear, and cache them; ``share`` is its part of the CPU seconds of its sweep."""
    start = time.process_time()
    scored = score(weight, break_even_rank((weight.shape[0], weight.shape[1]), "pivoted"))
    tensors = {**scored.svd._asdict(), "importance": scored.importance}
    notes = json.dumps({"seconds": share + time.process_time() - start})
    with replacing(file) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, {"study": notes})
    return scored


def _file(folder: Path, target: Target) -> Path:
    return folder / f"{target.name}.safetensors"
