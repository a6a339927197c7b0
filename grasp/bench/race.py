"""GRASP's attribution by the package and by its plain definition, in turns, on models in the same state."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from grasp.compression.layer_cost import FLOP_FORMULAS
from grasp.compression.naive import SVDLinear, accumulate, insert_svd_
from grasp.errors import GraspError
from grasp.evaluation.generation import now
from grasp.method.ranks import retained_indices
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.running import first_device
from grasp.model.targets import Target
from grasp.statistics.gradients import DenseSum, gather_gradients
from grasp.statistics.sweep import capture_prefix
from grasp_kernels.routes import contract_weight_grad

# The two sides may choose differently between groups whose importance differs by this fraction of the importance of the
# last retained group: rounding of fp32 sums.
LARGEST_GAP = 1e-3


class WrongSelectionError(GraspError):
    """Rounding does not explain a difference of the singular groups that the two sides retain."""


@dataclass
class Laps:
    """Seconds of one side: a list per sweep, an element per batch."""

    sweeps: list[list[float]] = field(default_factory=list)

    def total(self, batches: int) -> float:
        """Seconds of all sweeps over so many batches, the first of each and those that were not timed at the median."""
        return sum(sum(s[1:]) + median(s[1:]) * (1 + batches - len(s)) for s in self.sweeps)

    @property
    def spread(self) -> float:
        """Distance between the slowest and the fastest batch, as a fraction of the median, in the worst sweep."""
        return max((max(s[1:]) - min(s[1:])) / median(s[1:]) for s in self.sweeps)


@dataclass
class Race:
    """The measurements of one schedule. The first batch of each sweep warms up, and may decompose weights."""

    prefix: Laps
    grasp: Laps
    naive: Laps  # batch by batch, as grasp; within a batch, sequence by sequence
    contraction_seconds: float = 0.0  # grasp contracts gradients with the factors once for the whole set
    naive_svd_seconds: float = 0.0
    naive_flops: int = 0  # of one sequence in all sweeps, counted during the run
    groups: int = 0  # retained groups
    swaps: int = 0  # retained groups that the sides choose differently
    largest_gap: float = 0.0  # of their importance, as a fraction of that of the last retained group

    def grasp_seconds(self, batches: int) -> float:
        """Seconds of the package's attribution of the whole set, without decompositions."""
        return self.prefix.total(batches) + self.grasp.total(batches) + self.contraction_seconds


def compare(retained: Tensor, importance: Tensor) -> tuple[int, float]:
    """How many groups are retained in the place of more important ones, and the largest difference of their importance.

    The difference is a fraction of the importance of the last group that should be retained; ``importance`` is
    (groups,).
    """
    expected = retained_indices(importance, len(retained))
    lost = importance[expected[~torch.isin(expected, retained)]]
    if not len(lost):
        return 0, 0.0
    gained = importance[retained[~torch.isin(retained, expected)]]
    return len(lost), float((lost.max() - gained.min()) / importance[expected].min())


def race(
    grasp: PreTrainedModel,
    naive: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    sweeps: Sequence[Sequence[Target]],
    retain_ratio: float,
    *,
    tokens: int,
    dtype: str | None = None,
) -> Race:
    """Run both sides through the same sweeps, in turns batch by batch; compress both models to the same groups.

    Args:
        grasp: the package's model.
        naive: a copy of ``grasp``.
        batches: calibration set or a part of it; at least 2 batches of one size.
        sweeps: the linears of ``grasp``, sweep by sweep.
        retain_ratio: fraction of each matrix's parameters to keep.
        tokens: of the whole calibration set, which decide how the package sums gradients.
        dtype: dtype of the package's sweeps; the naive ones run in the model's own.

    Raises:
        WrongSelectionError: if the selections differ by more than ``LARGEST_GAP`` and ``dtype`` is ``None``.
    """
    result = Race(Laps([[]]), Laps(), Laps())
    clock = _Clock(first_device(grasp))
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
        result.grasp.sweeps.append([])
        result.naive.sweeps.append([])

        def take_turn(_: str, done: int, total: int) -> None:
            result.grasp.sweeps[-1].append(clock.lap())
            accumulate(naive, batches[done - 1].input_ids.split(1))
            result.naive.sweeps[-1].append(clock.lap())

        clock.lap()
        sums = gather_gradients(prefix, targets, progress=take_turn, tokens=tokens)
        for target in targets:
            total, layer = sums[target], layers[target.name]
            svd, grad = total.result(dense_weight(target.module))
            if isinstance(total, DenseSum):
                clock.lap()
                contract_weight_grad(total.tensor, svd.U, svd.Vh)
                result.contraction_seconds += clock.lap()
            retained = retained_indices((svd.S * grad).abs(), layer.rank(retain_ratio))
            swaps, gap = compare(retained, layer.importance)
            result.groups += len(retained)
            result.swaps += swaps
            result.largest_gap = max(result.largest_gap, gap)
            grasp.set_submodule(target.name, LowRankLinear.from_dense(target.module, retained, svd))
            naive.set_submodule(target.name, layer.truncated(retained))
            if dtype is None and result.largest_gap > LARGEST_GAP:
                raise WrongSelectionError(
                    f"{target.name}: groups chosen differently are {result.largest_gap:.1e} of the last retained "
                    f"group's importance apart, expected at most {LARGEST_GAP:.0e}"
                )
    return result


def _warm_up(naive: PreTrainedModel, layers: dict[str, SVDLinear], tokens: Tensor) -> int:
    """Run a sequence, drop its gradient, and return its FLOPs."""
    with FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as counter:
        accumulate(naive, [tokens])
    for layer in layers.values():
        layer.s.grad = None
    return counter.get_total_flops()


class _Clock:
    def __init__(self, device: torch.device) -> None:
        self._device, self._last = device, now(device)

    def lap(self) -> float:
        """Seconds since the last lap, with all work of the device."""
        last, self._last = self._last, now(self._device)
        return self._last - last
