"""Divide decoder layers into spans, so that the sums of one span and everything else fit into a memory budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from grasp.compression.layer_cost import Tracer
from grasp.errors import OutOfMemoryError
from grasp.formatting import size
from grasp.method.ranks import Shape
from grasp.model.dense import dense_shape
from grasp.model.targets import Target
from grasp.statistics.covariance import input_groups
from grasp.statistics.loss import LOGITS_BYTES

# Workspaces of libraries, and free heap memory that glibc keeps: up to 64 MiB (the largest M_TRIM_THRESHOLD).
LIBRARY_BYTES = 2**26
# Allocators keep freed blocks and reuse only a part of them.
_FRAGMENTATION = 2


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
    """What spans take on the device of the model, above the loaded model.

    Attributes:
        targets: the linears whose sums are gathered.
        layers: the layers that run, from the lowest with a target to the last one of the model.
        needs: of each of ``layers``.
        fixed: bytes that every span takes.
        head: bytes that the deepest span takes in addition, to compute the loss and its gradient.
        sum_bytes: bytes of the sums of some linears. Linears of different inputs (``input_groups``) share no sums.
        decomposition_bytes: temporary bytes of one decomposition. It runs while all sums of its span are held and no
            batch passes.
    """

    targets: Collection[Target]
    layers: range
    needs: Mapping[int, LayerNeeds]
    fixed: int
    head: int
    sum_bytes: Callable[[Collection[Target]], int]
    decomposition_bytes: Callable[[Target], int]

    def peak(self, layers: range, part: Collection[Target]) -> int:
        """The peak of a span in bytes while it gathers the sums of ``part``, and then decomposes its linears."""
        needs = [self.needs[layer] for layer in layers]
        passing = sum(need.activations for need in needs) + max(need.temporaries for need in needs)
        if layers.stop == self.layers.stop:
            passing += self.head
        decomposing = max(map(self.decomposition_bytes, part), default=0)
        return self.fixed + self.sum_bytes(part) + max(passing, decomposing)

    def least(self) -> int:
        """The smallest budget that ``plan`` accepts, in bytes."""
        groups = self._groups()
        return max(
            self.peak(range(layer, layer + 1), part) for layer in self.layers for part in groups.get(layer) or [()]
        )

    def plan(self, budget: int) -> list[PlannedSpan]:
        """The fewest spans whose peaks are at most ``budget`` bytes, the deepest first; one if all layers fit together.

        Every target is in exactly one part. A layer that does not fit alone is a span with several parts. The smallest
        part has the linears that share an input.

        Raises:
            OutOfMemoryError: if the smallest part of a layer does not fit; the message has the least that would do.
        """
        if (least := self.least()) > budget:
            raise OutOfMemoryError(
                f"{size(budget)} of memory above the loaded model are too little; this compression takes at least "
                f"{megabytes(least)}. Give --memory {megabytes(least)} or more if the device has them, a shorter "
                "--seq-len, or a smaller --batch-size"
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


def megabytes(number: int) -> str:
    """A number of bytes as an argument of ``--memory``, rounded up: ``"5243MB"``."""
    return f"{-(-number // 10**6)}MB"


def needs_of(
    tracer: Tracer, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
) -> dict[int, LayerNeeds]:
    """What each layer takes while one batch passes and its linears are visited; layers of equal structure run once.

    Args:
        tracer: the model without data, for the batch and the dtype of the sweeps.
        targets: the linears to visit, of the tracer's model or of one with the same names.
        layers: the layers that run, from the lowest with a target.
        ranks: ranks of the low-rank linears that stand in for dense ones, by name. Their factors are counted.
    """
    by_layer: defaultdict[int, list[Target]] = defaultdict(list)
    for target in targets:
        by_layer[target.layer].append(target)
    needs: dict[int, LayerNeeds] = {}
    for layer in layers:
        visited = by_layer[layer]
        low = {target.name: ranks[target.name] for target in visited if ranks and ranks.get(target.name)}
        cost = tracer.layer(layer, "starts" if layer == layers.start else "enters", visited=visited, ranks=low)
        shapes = {target.name: dense_shape(target.module) for target in visited}
        factors = tracer.model.dtype.itemsize * sum(rank * sum(shapes[name]) for name, rank in low.items())
        temporaries = cost.transient + visit_bytes(tracer, shapes.values()) + states_bytes(tracer)
        needs[layer] = LayerNeeds(cost.saved + factors, _FRAGMENTATION * temporaries)
    return needs


def states_bytes(tracer: Tracer) -> int:
    """The hidden states of one batch, in bytes."""
    width: int = tracer.model.get_output_embeddings().weight.shape[1]
    return tracer.batch.input_ids.numel() * width * tracer.model.dtype.itemsize


def visit_bytes(tracer: Tracer, shapes: Collection[Shape]) -> int:
    """Temporary bytes of adding one call to a sum: the tokens of 16-bit sweeps are converted to fp32."""
    converted = 0 if tracer.model.dtype.itemsize >= 4 else 4 * tracer.batch.input_ids.numel()
    return max((converted * (n + k) for n, k in shapes), default=0)


def head_bytes(tracer: Tracer) -> int:
    """The loss of one batch: a slice of logits in fp32 with its gradient, and hidden states and gradients beside it."""
    vocabulary = tracer.model.get_output_embeddings().weight.shape[0]
    rows = min(max(1, LOGITS_BYTES // (4 * vocabulary)), tracer.batch.input_ids.numel())
    logits = 2 * rows * vocabulary * max(4, tracer.model.dtype.itemsize)
    return _FRAGMENTATION * (logits + 3 * states_bytes(tracer))


def fixed_bytes(tracer: Tracer) -> int:
    """What every span takes: inputs, masks and positions, hidden states and their gradient, and library workspaces."""
    return tracer.base_bytes + 2 * states_bytes(tracer) + LIBRARY_BYTES
