"""Divide decoder layers into spans, so that the sums of one span and everything else fit into a memory budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from grasp.errors import OutOfMemoryError
from grasp.formatting import size
from grasp.model.targets import Target
from grasp.statistics.covariance import input_groups


class LayerNeeds(NamedTuple):
    """What a decoder layer takes on its device while one batch passes, in bytes."""

    activations: int  # from the forward to the backward pass; with the factors that stand in for dense weights
    temporaries: int  # in addition, at the peak of the backward pass


class PlannedSpan(NamedTuple):
    """A contiguous range of decoder layers that runs forward and backward by itself.

    The span runs once for each part, and keeps the sums of the linears of that part. A span of several layers has one
    part. A part without linears passes only the gradient on.
    """

    layers: range
    parts: tuple[tuple[Target, ...], ...]


@dataclass(frozen=True)
class SpanMemory:
    """What spans take on the device of the model, above the loaded model."""

    targets: Collection[Target]  # the linears whose sums are gathered
    layers: range  # the layers that run, from the lowest with a target to the last one of the model
    needs: Mapping[int, LayerNeeds]  # of each of ``layers``
    fixed: int  # bytes that every step takes
    head: int  # temporary bytes of the loss and its gradient, which the deepest span computes before its backward pass
    # bytes of the sums of some linears. Linears of different inputs (``input_groups``) share no sums.
    sum_bytes: Callable[[Collection[Target]], int]
    # temporary bytes of one decomposition. It runs while all sums of its span are held and no batch passes.
    decomposition_bytes: Callable[[Target], int]
    # bytes of the steps before and after the sweeps, beside ``fixed``: no division into spans changes them
    other: int = 0

    def passing(self, layers: range) -> int:
        """The peak of one batch in a span of ``layers``, in bytes."""
        needs = [self.needs[layer] for layer in layers]
        head = self.head if layers.stop == self.layers.stop else 0
        return sum(need.activations for need in needs) + max(head, *(need.temporaries for need in needs))

    def decomposing(self, part: Collection[Target]) -> int:
        """The peak of the decompositions of some linears, in bytes."""
        return max(map(self.decomposition_bytes, part), default=0)

    def peak(self, layers: range, part: Collection[Target]) -> int:
        """The peak of a span in bytes while it gathers the sums of ``part``, and then decomposes its linears."""
        return self.fixed + self.sum_bytes(part) + max(self.passing(layers), self.decomposing(part))

    def least(self) -> int:
        """The smallest budget that ``plan`` accepts, in bytes."""
        groups = self._groups()
        parts = [(range(layer, layer + 1), part) for layer in self.layers for part in groups.get(layer) or [()]]
        return max(self.fixed + self.other, *(self.peak(*part) for part in parts))

    def most(self) -> int:
        """The smallest budget with which all layers are one span, in bytes."""
        return max(self.least(), self.peak(self.layers, self.targets))

    def plan(self, budget: int) -> list[PlannedSpan]:
        """The fewest spans whose peaks are at most ``budget`` bytes, the deepest first; one if all layers fit together.

        Every target is in exactly one part. A layer that does not fit alone is a span with several parts. The smallest
        part has the linears that share an input.

        Raises:
            OutOfMemoryError: if the smallest part of a layer does not fit; the message has the least that would do.
        """
        if budget < (least := self.least()):
            needed = f"{-(-least // 10**6)}MB"  # rounded up
            raise OutOfMemoryError(
                f"{size(budget)} of memory above the loaded model are too little; this compression takes at least "
                f"{needed}. Give --memory {needed} or more if the device has them, a shorter --seq-len, or a smaller "
                "--batch-size"
            )
        groups = self._groups()
        spans: list[PlannedSpan] = []
        stop = self.layers.stop
        while stop > self.layers.start:
            start = stop - 1
            while start > self.layers.start and self._fits(range(start - 1, stop), groups, budget):
                start -= 1
            layers = range(start, stop)
            whole = _members(layers, groups)
            split = self.peak(layers, whole) > budget
            spans.append(PlannedSpan(layers, self._parts(start, groups[start], budget) if split else (whole,)))
            stop = start
        return spans

    def most_of(self, spans: Collection[PlannedSpan]) -> int:
        """The peak of all steps with these spans, in bytes."""
        return max(self.fixed + self.other, *(self.peak(span.layers, part) for span in spans for part in span.parts))

    def _fits(self, layers: range, groups: Mapping[int, list[tuple[Target, ...]]], budget: int) -> bool:
        return self.peak(layers, _members(layers, groups)) <= budget

    def _parts(self, layer: int, groups: list[tuple[Target, ...]], budget: int) -> tuple[tuple[Target, ...], ...]:
        """Put the groups of one layer into few parts: each, the largest first, into the first part with room for it."""
        parts: list[tuple[Target, ...]] = []
        for group in sorted(groups, key=self.sum_bytes, reverse=True):
            fitting = (i for i, part in enumerate(parts) if self.peak(range(layer, layer + 1), part + group) <= budget)
            if (index := next(fitting, None)) is None:
                parts.append(group)
            else:
                parts[index] += group
        return tuple(parts)

    def _groups(self) -> dict[int, list[tuple[Target, ...]]]:
        groups: defaultdict[int, list[tuple[Target, ...]]] = defaultdict(list)
        for group in input_groups(self.targets):
            groups[group[0].layer].append(group)
        return groups


def _members(layers: range, groups: Mapping[int, list[tuple[Target, ...]]]) -> tuple[Target, ...]:
    return tuple(target for layer in layers for group in groups.get(layer, []) for target in group)
