"""GRASP's attribution by the package and by the formulas, in turn, on models in one state."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from grasp.compression.layer_cost import FLOP_FORMULAS
from grasp.compression.naive import SVDLinear, accumulate, insert_svd_
from grasp.errors import GraspError
from grasp.method.ranks import retained_indices
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target
from grasp.statistics.gradients import DenseSum, FactoredSum, gather_gradients
from grasp.statistics.sweep import capture_prefix
from grasp_kernels.routes import contract_weight_grad

# How far apart the importance of two singular groups may be that the two sides choose differently between, relative to
# that of the last group kept: what fp32 sums may get wrong.
LARGEST_GAP = 1e-3


class WrongSelectionError(GraspError):
    """The two sides keep other singular groups than rounding explains."""


class Swaps(NamedTuple):
    """Singular groups that one side keeps and the other does not."""

    groups: int
    gap: float  # between the importance of those, relative to that of the last group kept


@dataclass
class Laps:
    """Seconds of one side: a list for each sweep, an element for each batch."""

    sweeps: list[list[float]] = field(default_factory=list)

    def total(self, batches: int) -> float:
        """Of all sweeps over so many batches: the sum, or where fewer were run, what their medians add up to."""
        return sum(sum(s) if len(s) == batches else median(s[1:]) * batches for s in self.sweeps)

    @property
    def spread(self) -> float:
        """Distance between the slowest and the fastest batch, relative to the median; the worst of any sweep."""
        return max((max(s[1:]) - min(s[1:])) / median(s[1:]) for s in self.sweeps)


@dataclass
class Race:
    """What was measured of one schedule. The first batch of each sweep warms up, unless the set is run whole."""

    prefix: Laps
    grasp: Laps
    naive: Laps  # a batch at a time, as grasp; within it, a sequence at a time
    contraction_seconds: float = 0.0  # of grasp's gradients with the factors, once for the whole set
    naive_svd_seconds: float = 0.0
    naive_flops: int = 0  # of one sequence, counted while it ran, in all sweeps
    groups: int = 0  # kept
    swaps: int = 0  # of those, chosen differently
    largest_gap: float = 0.0  # see ``Swaps``

    def grasp_seconds(self, batches: int) -> float:
        """Attribution of the whole set by the package, without decompositions."""
        return self.prefix.total(batches) + self.grasp.total(batches) + self.contraction_seconds


def compare(kept: Tensor, importance: Tensor) -> Swaps:
    """How a selection differs from the most important groups; ``importance`` is (groups,)."""
    expected = retained_indices(importance, len(kept))
    lost = importance[expected[~torch.isin(expected, kept)]]
    if not len(lost):
        return Swaps(0, 0.0)
    gained = importance[kept[~torch.isin(kept, expected)]]
    return Swaps(len(lost), float((lost.max() - gained.min()) / importance[expected].min()))


def race(
    grasp: PreTrainedModel,
    naive: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    sweeps: Sequence[Sequence[Target]],
    retain_ratio: float,
    *,
    dtype: str | None = None,
) -> Race:
    """Run both sides through the same sweeps, batch by batch in turn; both models are compressed, to the same groups.

    Args:
        grasp: the package's model.
        naive: a copy of it.
        batches: calibration set, or some of it; all of one size, at least 2.
        sweeps: the linears of ``grasp`` that share a sweep, in their order.
        retain_ratio: parameters kept of each matrix.
        dtype: in which the package's sweeps are run; the naive ones are run in the model's own.

    Raises:
        WrongSelectionError: if the selections differ by more than ``LARGEST_GAP``. Not for another ``dtype``.
    """
    result = Race(Laps([[]]), Laps(), Laps())
    clock = _Clock()
    prefix = capture_prefix(
        grasp,
        batches,
        {min(target.layer for target in targets) for targets in sweeps},
        dtype=dtype,
        progress=lambda *_: result.prefix.sweeps[0].append(clock.lap()),
    )
    for targets in sweeps:
        clock.lap()
        layers = insert_svd_(naive, [target.name for target in targets])
        result.naive_svd_seconds += clock.lap()
        result.naive_flops += _warm_up(naive, layers, batches[0].input_ids[:1])
        ours: list[float] = []
        theirs: list[float] = []

        def take_turn(_: str, done: int, total: int, ours: list[float] = ours, theirs: list[float] = theirs) -> None:
            ours.append(clock.lap())
            accumulate(naive, batches[done - 1].input_ids.split(1))
            theirs.append(clock.lap())

        clock.lap()
        sums = gather_gradients(grasp, batches, targets, prefix, dtype=dtype, progress=take_turn)
        result.grasp.sweeps.append(ours)
        result.naive.sweeps.append(theirs)
        for target in targets:
            _replace_(grasp, naive, target, sums[target], layers[target.name], retain_ratio, result)
            if dtype is None and result.largest_gap > LARGEST_GAP:
                raise WrongSelectionError(
                    f"{target.name}: groups were chosen whose importance differs by {result.largest_gap:.1e} of the "
                    f"last one kept; expected at most {LARGEST_GAP:.0e}"
                )
    return result


def _replace_(
    grasp: PreTrainedModel,
    naive: PreTrainedModel,
    target: Target,
    total: DenseSum | FactoredSum,
    layer: SVDLinear,
    retain_ratio: float,
    result: Race,
) -> None:
    """Compress one linear on both sides to the groups that the package chooses, and note how that differs."""
    svd, grad = total.result()
    if isinstance(total, DenseSum):
        result.contraction_seconds += _contraction(total, svd)
    kept = retained_indices((svd.S * grad).abs(), layer.rank(retain_ratio))
    swaps = compare(kept, layer.importance)
    result.groups += len(kept)
    result.swaps += swaps.groups
    result.largest_gap = max(result.largest_gap, swaps.gap)
    grasp.set_submodule(target.name, LowRankLinear.from_dense(target.module, kept, svd))
    naive.set_submodule(target.name, layer.truncated(kept))


def _contraction(total: DenseSum, svd: SVD) -> float:
    clock = _Clock()
    contract_weight_grad(total.tensor, svd.U, svd.Vh)
    return clock.lap()


def _warm_up(naive: PreTrainedModel, layers: dict[str, SVDLinear], tokens: Tensor) -> int:
    """Run a sequence whose gradient does not count; its FLOPs."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        accumulate(naive, [tokens])
    for layer in layers.values():
        layer.s.grad = None
    return counter.get_total_flops()


class _Clock:
    def __init__(self) -> None:
        self._last = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap."""
        last, self._last = self._last, time.perf_counter()
        return self._last - last
