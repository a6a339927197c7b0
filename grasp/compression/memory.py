"""Divide decoder layers into spans, so that the sums of one span and everything else fit into a memory budget."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from transformers import PreTrainedModel

from grasp.compression.layer_cost import Tracer
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError, UnsupportedModelError
from grasp.formatting import size
from grasp.method.basis import BASES
from grasp.method.ranks import Shape
from grasp.method.svd import decomposition_bytes
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape
from grasp.model.offload import fetched_bytes
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder
from grasp.statistics.covariance import covariance_bytes, input_groups
from grasp.statistics.gradients import dense_is_cheaper
from grasp.statistics.loss import LOGITS_BYTES
from grasp.statistics.processes import ALONE, Processes

# Workspaces of libraries, and free heap memory that glibc keeps: up to 64 MiB (the largest M_TRIM_THRESHOLD).
LIBRARY_BYTES = 2**26
# Allocators keep freed blocks and reuse only a part of them.
_FRAGMENTATION = 2
FREE_FRACTION = 0.9  # of the free memory, if no budget is given
_CGROUP = Path("/sys/fs/cgroup")


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
    known = dict(tracer.model.named_modules())  # a loaded model may have been changed
    by_layer: defaultdict[int, list[Target]] = defaultdict(list)
    for target in targets:
        if target.name in known:
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


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a compression may take above the loaded model.

    Attributes:
        tracer: the model without data; ``None`` if it cannot run without data, then all layers are one span.
        config: what to compress and how.
        tokens: all calibration tokens.
        device: bytes for a span, on the device of the model.
        hidden_states: bytes of CPU memory for hidden states; ``None`` for any number.
        fetched: bytes of a weight that is offloaded or sharded, while its linear runs; 0 if all weights are in memory.
    """

    tracer: Tracer | None
    config: GraspConfig
    tokens: int
    device: int
    hidden_states: int | None
    fetched: int = 0

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        targets: Collection[Target],
        *,
        memory: int | None,
        host_memory: int | None,
        processes: Processes = ALONE,
    ) -> MemoryBudget:
        """The budget for a loaded model; ``None`` is 0.9 of what is free, divided by the processes of a CPU.

        All processes get the smallest of their budgets for the device, so that they plan the same spans.

        Raises:
            OutOfMemoryError: if it is too small.
            ValueError: if ``host_memory`` is given and the model is on the CPU.
            UnsupportedModelError: if ``memory`` is given and the model cannot run without data.
        """
        device, dtype = (
            first_device(model),
            model.dtype if config.sweep_dtype is None else getattr(torch, config.sweep_dtype),
        )
        on_cpu = device.type == "cpu"
        if on_cpu and host_memory is not None:
            raise ValueError(
                "host_memory is for a model on a GPU; on a CPU memory covers everything: give memory alone"
            )
        sizes = [batch.input_ids.shape for batch in batches]
        tokens = sum(batch.num_tokens for batch in batches)
        try:
            tracer = Tracer(
                model.config,
                dtype=dtype,
                device=device,
                batch_size=max(size[0] for size in sizes),
                seq_len=max(size[1] for size in sizes),
            )
        except UnsupportedModelError:
            if memory is not None:
                raise
            return cls(None, config, tokens, 0, host_memory)
        sharers = processes.size if on_cpu else 1
        given = processes.least(int(FREE_FRACTION * free_bytes(device) / sharers) if memory is None else memory)
        budget = cls(tracer, config, tokens, given, None, fetched_bytes(model))
        spans = budget._memory(targets, range(0, len(decoder(model).layers)), None)
        spans.plan(given)  # an error is raised now, not after the block influence
        if on_cpu:
            left = given - spans.peak(spans.layers, targets)
        else:
            left = int(FREE_FRACTION * free_bytes(torch.device("cpu"))) if host_memory is None else host_memory
        return replace(budget, hidden_states=max(0, left))

    def spans(
        self, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
    ) -> list[PlannedSpan]:
        """Divide layers into spans, see ``SpanMemory.plan``."""
        if self.tracer is None:
            return [PlannedSpan(layers, (tuple(targets),))]
        return self._memory(targets, layers, ranks).plan(self.device)

    def _memory(self, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None) -> SpanMemory:
        assert self.tracer is not None
        basis = BASES[self.config.basis]
        return SpanMemory(
            targets,
            layers,
            needs_of(self.tracer, targets, layers, ranks),
            fixed=fixed_bytes(self.tracer) + self.fetched,
            head=head_bytes(self.tracer),
            sum_bytes=partial(sum_bytes, self.config, self.tokens),
            decomposition_bytes=lambda target: decomposition_bytes(
                dense_shape(target.module), inputs=basis.inputs, outputs=basis.outputs
            ),
        )


def sum_bytes(config: GraspConfig, tokens: int, targets: Collection[Target]) -> int:
    """The sums of some linears: covariances, or the gradient of each weight, or its decomposition and its gradient."""
    basis = BASES[config.basis]
    if basis.inputs:
        return covariance_bytes(targets, outputs=basis.outputs)
    numbers = 0
    for target in targets:
        n, k = dense_shape(target.module)
        item = max(4, target.module.weight.element_size())
        numbers += item * (n * k if dense_is_cheaper((n, k), tokens) else min(n, k) * (n + k + 2))
    return numbers


def free_bytes(device: torch.device) -> int:
    """Free memory of a device; for a CPU, the memory that the system and the container have without swapping."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_cgroup_free()])
    return int(torch.accelerator.get_memory_info(device)[0])


def _cgroup_free() -> list[int]:
    """Free bytes of the control group of a container, its file cache included; empty if there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        statistics = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - used + int(statistics.get("inactive_file", 0))]
