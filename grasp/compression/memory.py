"""Divide decoder layers into spans, so that the sums of one span and everything else fit into a memory budget."""

from __future__ import annotations

import ctypes
import os
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from grasp.compression.layer_cost import Tracer, tracer_for
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError, UnsupportedModelError
from grasp.formatting import size
from grasp.method.basis import BASES
from grasp.method.least_squares import least_squares_bytes
from grasp.method.metrics import METRICS
from grasp.method.ranks import Shape, break_even_rank
from grasp.method.schedules import plan_sweeps
from grasp.method.svd import decomposition_bytes
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape
from grasp.model.offload import fetched_bytes
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder
from grasp.statistics.covariance import covariance_bytes, input_groups
from grasp.statistics.gradients import dense_is_cheaper
from grasp.statistics.loss import LOGITS_BYTES, vocabulary_size
from grasp.statistics.processes import ALONE, Processes
from grasp_kernels.reference import accumulation_dtype

LIBRARY_BYTES = 2**25  # workspaces of libraries, and what the allocator keeps between two ``return_freed_memory``
# oneDNN keeps the code of products of 16-bit numbers on a CPU: 0.55 to 0.75 MB were measured for each of 1024 shapes.
CODE_BYTES, CODE_SHAPES = 650_000, int(os.environ.get("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1024"))
FREE_FRACTION = 0.9  # of the memory that is free once the model is loaded, if no budget is given
_CGROUP = Path("/sys/fs/cgroup")
# Allocators keep freed blocks and reuse only a part of them.
FRAGMENTATION = 2


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
        fixed: bytes that every step takes.
        head: temporary bytes of the loss and its gradient, which the deepest span computes before its backward pass.
        sum_bytes: bytes of the sums of some linears. Linears of different inputs (``input_groups``) share no sums.
        decomposition_bytes: temporary bytes of one decomposition. It runs while all sums of its span are held and no
            batch passes.
        other: bytes of the steps before and after the sweeps, beside ``fixed``: no division into spans changes them.
    """

    targets: Collection[Target]
    layers: range
    needs: Mapping[int, LayerNeeds]
    fixed: int
    head: int
    sum_bytes: Callable[[Collection[Target]], int]
    decomposition_bytes: Callable[[Target], int]
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
        require_budget(budget, self.least())
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


def check_budgets(memory: int | None, host_memory: int | None, *, on_cpu: bool) -> None:
    """Refuse budgets that are not positive, and one for the CPU memory beside a device if the model is on the CPU.

    Raises:
        ValueError: in these cases.
    """
    for name, value in (("memory", memory), ("host_memory", host_memory)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be a positive number of bytes, got {value}")
    if on_cpu and host_memory is not None:
        raise ValueError("host_memory is for CPU memory beside a GPU, but the model is on the CPU; give memory")


def require_budget(budget: int, least: int) -> None:
    """Raise ``OutOfMemoryError`` if a budget is below the least that would do; both in bytes."""
    if budget < least:
        raise OutOfMemoryError(
            f"{size(budget)} of memory above the loaded model are too little; this compression takes at least "
            f"{megabytes(least)}. Give --memory {megabytes(least)} or more if the device has them, a shorter "
            "--seq-len, or a smaller --batch-size"
        )


def megabytes(number: int) -> str:
    """A number of bytes as an argument of ``--memory``, rounded up: ``"5243MB"``."""
    return f"{-(-number // 10**6)}MB"


def span_memory(
    tracer: Tracer,
    targets: Collection[Target],
    config: GraspConfig,
    tokens: int,
    *,
    dtype: torch.dtype,
    ranks: Mapping[str, int] | None = None,
    extra: int = 0,
) -> SpanMemory:
    """What the spans of one sweep take.

    Args:
        tracer: the model without data, for the batch and the dtype of the sweeps.
        targets: the linears of the sweep, of the tracer's model or of one with the same names.
        config: the configuration.
        tokens: calibration tokens of one process.
        dtype: of the weights.
        ranks: ranks of the low-rank linears that stand in for dense ones, by name. ``None``: none, or as many as the
            schedule needs at most.
        extra: bytes that every step takes in addition.
    """
    layers = range(min(target.layer for target in targets), len(decoder(tracer.model).layers))
    needs = needs_of(tracer, targets, layers, ranks, dtype=dtype)
    if ranks is None and config.schedule == "progressive":
        most = {target.name: break_even_rank(dense_shape(target.module)) for target in targets}
        low = needs_of(tracer, targets, layers, most, dtype=dtype)
        needs = {layer: LayerNeeds(*map(max, needs[layer], low[layer])) for layer in layers}
    return SpanMemory(
        targets=targets,
        layers=layers,
        needs=needs,
        fixed=fixed_bytes(tracer, dtype) + code_bytes(tracer, targets, ranks) + extra,
        head=head_bytes(tracer),
        sum_bytes=lambda part: statistics_bytes(part, config, tokens),
        decomposition_bytes=lambda target: temporary_bytes(target, config),
        other=max(
            forward_bytes(tracer, range(layers.start), dtype), refit_bytes(tracer, targets) if config.refit else 0
        ),
    )


def forward_bytes(tracer: Tracer, layers: range, dtype: torch.dtype) -> int:
    """One batch that passes the model without a graph, and the copies of some layers in the dtype of the sweeps."""
    modules = decoder(tracer.model).layers
    costs = [tracer.layer(layer, "none") for layer in range(len(modules))]
    passing = states_bytes(tracer) + FRAGMENTATION * max(cost.saved + cost.transient for cost in costs)
    return passing + sum(copy_bytes(tracer, modules[layer], dtype) for layer in layers)


def copy_bytes(tracer: Tracer, module: nn.Module, dtype: torch.dtype) -> int:
    """A copy of a module in the dtype of the sweeps, in bytes; 0 if its weights have that dtype."""
    itemsize = 0 if dtype == tracer.model.dtype else tracer.model.dtype.itemsize
    return itemsize * sum(parameter.numel() for parameter in module.parameters())


def refit_bytes(tracer: Tracer, targets: Collection[Target]) -> int:
    """The refit of one linear: two sums of its input, and one batch that passes its layer, or the solution."""
    taken = []
    for target in targets:
        (n, k), itemsize = dense_shape(target.module), _sum_itemsize(target)
        solving = least_squares_bytes((n, k), break_even_rank((n, k)), itemsize)
        cost = tracer.layer(target.layer, "none")
        passing = states_bytes(tracer) + FRAGMENTATION * (cost.saved + cost.transient)
        taken.append(2 * itemsize * k * k + max(passing, solving))
    return max(taken, default=0)


def statistics_bytes(targets: Collection[Target], config: GraspConfig, tokens: int) -> int:
    """The sums of one sweep: covariances, or the gradient of each weight, or its decomposition and their gradients."""
    basis = BASES[config.basis]
    shapes = [(_sum_itemsize(target), *dense_shape(target.module)) for target in targets]
    groups = sum(itemsize * min(n, k) * (n + k + 2) for itemsize, n, k in shapes)
    if basis.inputs:
        covariances = covariance_bytes(targets, outputs=basis.outputs)
        return covariances if METRICS[config.metric].moment == "none" else max(covariances, groups)
    return sum(
        itemsize * (n * k if dense_is_cheaper((n, k), tokens) else min(n, k) * (n + k + 2)) for itemsize, n, k in shapes
    )


def temporary_bytes(target: Target, config: GraspConfig) -> int:
    """The temporaries and the result of one decomposition."""
    basis, shape = BASES[config.basis], dense_shape(target.module)
    groups = retained_groups(config, shape)
    itemsize = _sum_itemsize(target)
    return decomposition_bytes(shape, inputs=basis.inputs, outputs=basis.outputs, rank=groups, itemsize=itemsize)


def retained_groups(config: GraspConfig, shape: Shape) -> int | None:
    """How many groups a decomposition returns: by ``magnitude`` the first ones are retained, else all (``None``)."""
    if METRICS[config.metric].moment != "none" or not BASES[config.basis].inputs:
        return None
    return max(1, break_even_rank(shape))


def _sum_itemsize(target: Target) -> int:
    return accumulation_dtype(target.module.weight.dtype).itemsize


def needs_of(
    tracer: Tracer,
    targets: Collection[Target],
    layers: range,
    ranks: Mapping[str, int] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[int, LayerNeeds]:
    """What each layer takes while one batch passes and its linears are visited; layers of equal structure run once.

    Args:
        tracer: the model without data, for the batch and the dtype of the sweeps.
        targets: the linears to visit, of the tracer's model or of one with the same names.
        layers: the layers that run, from the lowest with a target.
        ranks: ranks of the low-rank linears that stand in for dense ones, by name. Their factors are counted.
        dtype: of the weights, if it is another than that of the sweeps: a copy of the layer is counted.
    """
    known = dict(tracer.model.named_modules())  # a loaded model may have been changed
    by_layer: defaultdict[int, list[Target]] = defaultdict(list)
    for target in targets:
        if target.name in known:
            by_layer[target.layer].append(target)
    modules = decoder(tracer.model).layers
    needs: dict[int, LayerNeeds] = {}
    for layer in layers:
        visited = by_layer[layer]
        low = {target.name: ranks[target.name] for target in visited if ranks and ranks.get(target.name)}
        cost = tracer.layer(layer, "starts" if layer == layers.start else "enters", visited=visited, ranks=low)
        shapes = {target.name: dense_shape(target.module) for target in visited}
        factors = tracer.model.dtype.itemsize * sum(rank * sum(shapes[name]) for name, rank in low.items())
        copied = 0 if dtype is None else copy_bytes(tracer, modules[layer], dtype)
        temporaries = cost.transient + visit_bytes(tracer, shapes.values()) + states_bytes(tracer)
        needs[layer] = LayerNeeds(cost.saved + factors + copied, FRAGMENTATION * temporaries)
    return needs


def states_bytes(tracer: Tracer) -> int:
    """The hidden states of one batch, in bytes."""
    return tracer.batch.input_ids.numel() * tracer.width * tracer.model.dtype.itemsize


def visit_bytes(tracer: Tracer, shapes: Collection[Shape]) -> int:
    """Temporary bytes of adding one call to a sum: the tokens of 16-bit sweeps are converted to fp32."""
    converted = 0 if tracer.model.dtype.itemsize >= 4 else 4 * tracer.batch.input_ids.numel()
    return max((converted * (n + k) for n, k in shapes), default=0)


def head_bytes(tracer: Tracer) -> int:
    """The loss of one batch: a slice of logits in fp32 with its gradient, and hidden states and gradients beside it."""
    vocabulary = vocabulary_size(tracer.model)
    rows = min(max(1, LOGITS_BYTES // (4 * vocabulary)), tracer.batch.input_ids.numel())
    logits = 2 * rows * vocabulary * max(4, tracer.model.dtype.itemsize)
    return FRAGMENTATION * (logits + 3 * states_bytes(tracer))


def fixed_bytes(tracer: Tracer, dtype: torch.dtype) -> int:
    """What every step takes: a batch outside the layers, its hidden states and their gradient, and workspaces.

    If the weights have another dtype than the sweeps, the weights outside the layers are copied.
    """
    outside = copy_bytes(tracer, tracer.model, dtype) - copy_bytes(tracer, decoder(tracer.model).layers, dtype)
    return tracer.base_bytes + 2 * states_bytes(tracer) + LIBRARY_BYTES + outside


def code_bytes(tracer: Tracer, targets: Collection[Target], ranks: Mapping[str, int] | None) -> int:
    """The code of low-rank products, four for each rank of a shape; without ``ranks`` each linear has its own."""
    if tracer.batch.input_ids.device.type != "cpu" or tracer.model.dtype.itemsize != 2:
        return 0
    ranks = {target.name: index for index, target in enumerate(targets)} if ranks is None else ranks
    shapes = {(dense_shape(target.module), ranks[target.name]) for target in targets if target.name in ranks}
    return CODE_BYTES * min(CODE_SHAPES, 4 * len(shapes))


@dataclass(frozen=True)
class MemoryBudget:
    """How much memory a compression may take above the loaded model.

    Attributes:
        tracer: the model without data; ``None`` if it cannot run without data, then all layers are one span.
        config: what to compress and how.
        tokens: all calibration tokens.
        dtype: of the weights.
        fetched: bytes of a weight that is offloaded or sharded, while its linear runs; 0 if all weights are in memory.
        device: bytes for a span, on the device of the model.
        hidden_states: bytes of CPU memory for hidden states; ``None`` for any number.
    """

    tracer: Tracer | None
    config: GraspConfig
    tokens: int
    dtype: torch.dtype
    fetched: int
    device: int
    hidden_states: int | None

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
        """The budget for a loaded model; ``None`` is 0.9 of what is free. Processes divide free CPU memory.

        All processes get the smallest of their budgets for the device, so that they plan the same spans.

        On a CPU, hidden states have what the largest span leaves.

        Raises:
            OutOfMemoryError: if it is too small.
            ValueError: if ``host_memory`` is given and the model is on the CPU.
            UnsupportedModelError: if ``memory`` is given and the model cannot run without data.
        """
        device = first_device(model)
        on_cpu = device.type == "cpu"
        check_budgets(memory, host_memory, on_cpu=on_cpu)
        is_given = memory is not None
        if memory is None:
            memory = int(FREE_FRACTION * free_bytes(device) / (processes.size if on_cpu else 1))
        memory = processes.least(memory)
        if host_memory is None and not on_cpu:
            host_memory = int(FREE_FRACTION * free_bytes(torch.device("cpu")) / processes.size)
        shapes = [batch.input_ids.shape for batch in batches]
        tokens = sum(batch.num_tokens for batch in batches)
        try:
            tracer = tracer_for(
                model.config,
                dtype=model.dtype if config.sweep_dtype is None else getattr(torch, config.sweep_dtype),
                device=device,
                batch_size=max(rows for rows, _ in shapes),
                seq_len=max(columns for _, columns in shapes),
                model_class=type(model),  # transformers may not know it
            )
        except UnsupportedModelError:
            if is_given:
                raise
            return cls(None, config, tokens, model.dtype, 0, memory, host_memory)
        budget = cls(tracer, config, tokens, model.dtype, fetched_bytes(model), memory, host_memory)
        linears = [target for target in targets if config.layers is None or target.layer in config.layers]
        peaks = []  # found now, so that too little memory is refused before the block influence is measured
        for members in plan_sweeps(linears, config.schedule):
            spans = budget._memory(members, None)
            peaks.append(spans.most_of(spans.plan(memory)))
        if not on_cpu or not peaks:
            return budget
        return replace(budget, device=max(peaks), hidden_states=memory - max(peaks))

    def spans(
        self, targets: Collection[Target], layers: range, ranks: Mapping[str, int] | None = None
    ) -> list[PlannedSpan]:
        """Divide layers into spans, see ``SpanMemory.plan``."""
        if self.tracer is None:
            return [PlannedSpan(layers, (tuple(targets),))]
        return self._memory(targets, ranks or {}).plan(self.device)

    def _memory(self, targets: Collection[Target], ranks: Mapping[str, int] | None) -> SpanMemory:
        assert self.tracer is not None
        return span_memory(
            *(self.tracer, targets, self.config, self.tokens), dtype=self.dtype, ranks=ranks, extra=self.fetched
        )


def return_freed_memory() -> None:
    """Give memory of the CPU that was freed back to the system, where the allocator keeps it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


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
