"""Estimate what a compression costs before it runs: sweeps, FLOPs, memory, disk and time. No weights are needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

from grasp.calibration import require_sizes
from grasp.compression.budget import Plan, bits_suffice, ceilings, choose_plan, find_prices
from grasp.compression.device_speed import Rates
from grasp.compression.eligible import check_layers, eligible_targets, require_positions
from grasp.compression.flops import FlopCounter, Flops, SweepCost
from grasp.compression.job import CompressionJob
from grasp.compression.layer_cost import Tracer, tracer_for
from grasp.compression.memory import (
    LIBRARY_BYTES,
    form_in_sweeps,
    forward_bytes,
    is_down,
    quantizing_bytes,
    span_memory,
)
from grasp.compression.span_plan import PlannedSpan, SpanMemory
from grasp.config import GraspConfig
from grasp.method.channels import widths_of
from grasp.method.ranks import Shape, break_even_rank, parameters_at, parameters_removed
from grasp.method.schedules import plan_sweeps
from grasp.model.dense import dense_shape
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder
from grasp.progress import TimeLeft
from grasp.statistics.covariance import distinct_inputs

# Hidden states of all batches that a refit or a quantisation holds: the inputs of both streams, and the outputs of one.
REFIT_STREAMS = 3

REPEATED = ("hidden states", "covariances", "decompositions", TimeLeft.REST)  # kinds of steps that each sweep has


@dataclass(frozen=True)
class Memory:
    """Bytes that one process takes at the peak, above the loaded model, by use.

    All but the states and ``disk`` are on the device of the model. A decomposition runs while no batch passes.
    """

    fixed: int  # the model in ``sweep_dtype``, gathered layers, one batch outside the layers, library workspaces
    factors: int  # of low-rank linears while the dense ones still exist
    sums: int  # of the linears of one span or sweep
    batch: int  # one batch that passes the layers of the span: activations, temporaries, logits
    decomposition: int  # of one linear
    other: int  # of refit: the sums of one input, and a solution; or one batch before the sweeps
    on_cpu: bool  # whether the model is in CPU memory
    hidden_states: int = 0  # inputs of layers and gradients, for all batches, in CPU memory during the sweeps
    refit_states: int = 0  # likewise during the refit, or while weights are quantised
    disk: int = 0  # the run folder, with the hidden states beyond the budget, or the checkpoint

    @property
    def peak(self) -> int:
        """Peak on the device of the model."""
        sweeping, other = self.sums + max(self.batch, self.decomposition), self.other
        if self.on_cpu:
            sweeping, other = sweeping + self.hidden_states, other + self.refit_states
        return self.fixed + self.factors + max(sweeping, other)

    @property
    def host(self) -> int:
        """Peak in CPU memory beside another device; 0 if the model is in CPU memory."""
        return 0 if self.on_cpu else max(self.hidden_states, self.refit_states)


@dataclass(frozen=True)
class Estimate:
    """The cost of a compression.

    The redundant layers are known only after block influence is measured. Unless the configuration determines them,
    ``layers`` are the layers in the middle of the model, ``fewest`` and ``most`` are the FLOPs for the last and the
    first layers, and ``memory`` is the maximum of the three.
    """

    batch_size: int  # sequences per forward pass
    layers: tuple[int, ...]  # layers to compress, ascending
    assumed: bool  # whether ``layers`` is an assumption
    sweeps: tuple[SweepCost, ...]  # in their order
    passes: int  # how often each sweep runs
    flops: Flops  # for ``layers``
    fewest: int  # lower bound of the total FLOPs
    most: int  # upper bound of the total FLOPs
    memory: Memory  # bytes above the loaded model
    least_memory: int  # the smallest memory budget with which the compression runs, in bytes
    model_bytes: int  # bytes of the parameters of the model; of the part of one process if it is sharded
    largest_matrix: Shape  # (N, K) of the largest linear that could be compressed
    processes: int  # processes that share the work
    rounds: int  # how often all linears are scored
    in_order: bool  # whether linears are replaced sweep by sweep

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Kind of step → time at the given rates, of matrix products and decompositions only.

        A kind is the name of a progress step up to its first comma; ``TimeLeft.REST`` has the sweeps whose steps are
        named after their layers.
        """
        flops, sums = self.flops, self.flops.statistics / rates.statistics
        fit = flops.refit / rates.sweeps + flops.refit_sums / rates.statistics + flops.refit_solutions / rates.svd
        kinds = {
            "block influence": flops.block_influence / rates.sweeps,
            "prefix" if self.in_order else "hidden states": flops.prefix / rates.sweeps,
            TimeLeft.REST if self.in_order else "covariances": flops.sweeps / rates.sweeps + sums,
            "decompositions": flops.decompositions / rates.svd,
            "candidates": flops.held_out / rates.sweeps + fit * bool(flops.held_out),  # one is fitted, for good
            "refit": fit * (not flops.held_out),
            "quantising": flops.quantizing / rates.sweeps + flops.rounding / rates.svd,
        }
        shares = dict.fromkeys(kinds, self.processes) | {"quantising": 1}  # each process quantises with all batches
        return {kind: seconds / shares[kind] for kind, seconds in kinds.items() if seconds}

    def time_left(self, rates: Rates) -> TimeLeft:
        """What shows the time left of the whole job at the given rates, adjusted to the pace that it has."""
        return TimeLeft(
            self.seconds(rates), dict.fromkeys(REPEATED, self.rounds * len(self.sweeps)) | {"candidates": 5}
        )

    def to_dict(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        totals = {"flops": self.flops.total, "peak_bytes": self.memory.peak, "host_bytes": self.memory.host}
        return {**asdict(self), "layers": list(self.layers), "totals": totals}


def estimate(
    job: CompressionJob, batch_size: int = 1, *, memory: int | None = None, host_memory: int | None = None
) -> Estimate:
    """Count what ``compress_`` costs by running layers on tensors without data (``grasp.compression.layer_cost``).

    Args:
        job: the compression.
        batch_size: sequences per forward pass.
        memory: the budget of the device of the model, in bytes above the loaded model; ``None``: as much as one span
            takes.
        host_memory: the budget of CPU memory beside another device, in bytes; ``None``: as much as is taken.

    Raises:
        ValueError: if the configuration asks for layers or a ratio that the model does not have, or a number is not
            positive.
        CalibrationError: if the model has fewer positions than ``seq_len``.
        OutOfMemoryError: if ``memory`` is too little; the message has the least that would do.
        UnsupportedModelError: if there is nothing to compress, or the layers cannot run without data.
    """
    require_sizes(num_samples=job.num_samples, seq_len=job.seq_len, batch_size=batch_size)
    config, batch_size = job.config, min(batch_size, job.num_samples)
    tracer = tracer_for(
        job.model_config, dtype=job.sweep_dtype, device=job.device, batch_size=batch_size, seq_len=job.seq_len
    )
    require_positions(tracer.model, [tracer.batch])
    depth = len(decoder(tracer.model).layers)
    check_layers(config, depth)
    estimator = _Estimator(job, tracer, memory, host_memory)
    middle = sorted(range(depth), key=lambda layer: abs(layer - (depth - 1) / 2))
    orders = [middle, list(reversed(range(depth))), list(range(depth))]  # from the most redundant layer on
    cases = list(map(estimator.case, orders if config.layers is None else orders[:1]))
    totals = [case.flops.total for case in cases]
    return Estimate(
        batch_size=batch_size,
        layers=cases[0].layers,
        # A latency takes as many layers as the costs of decoding tell, which are not known here.
        assumed=(config.target_latency is not None and config.layers is None and config.scope != "model")
        or any(case.layers != cases[0].layers for case in cases),
        sweeps=cases[0].sweeps,
        passes=estimator.job.passes_per_sweep,
        flops=cases[0].flops,
        fewest=min(totals),
        most=max(totals),
        memory=max((case.memory for case in cases), key=lambda memory: memory.peak),
        least_memory=max(case.least_memory for case in cases),
        model_bytes=estimator.model_bytes(),
        largest_matrix=max(estimator.shapes, key=math.prod),
        processes=job.processes,
        rounds=estimator.job.rounds,
        in_order=not config.decides_together,
    )


class _Case(NamedTuple):
    """The cost of a compression for one order of redundancy."""

    layers: tuple[int, ...]
    sweeps: tuple[SweepCost, ...]
    flops: Flops
    memory: Memory
    least_memory: int


class _Estimator:
    """A job, and its model without data."""

    def __init__(self, job: CompressionJob, tracer: Tracer, memory: int | None, host_memory: int | None) -> None:
        self._tracer, self._budget, self._host_budget = tracer, memory, host_memory
        self.targets = eligible_targets(tracer.model)[0]
        self.shapes = [dense_shape(target.module) for linears in self.targets.values() for target in linears]
        self.parameters = model_size(tracer.model).parameters
        if job.config.target_latency is None:
            self._prices = find_prices(job.config, tracer.model, self.targets, may_remove=True)
        else:  # the layers depend on costs: at most, all layers are compressed
            parameters = find_prices(GraspConfig(form=job.config.form), tracer.model, self.targets)
            self._prices = replace(parameters, saving=math.inf)
        if bits_suffice(job.config, self.targets, self._prices):  # one sweep, and no fit
            job = replace(job, config=replace(job.config, schedule="single-sweep", refit=False))
        self.job, self._flops = job, FlopCounter(job, tracer)
        self._cases: dict[tuple[int, ...], _Case] = {}

    def model_bytes(self) -> int:
        """The weights that one process has: of a sharded model its share of the linears, and all other weights."""
        shared = sum(map(math.prod, self.shapes)) if self.job.sharded else 0
        return (self.parameters - shared + shared // self.job.processes) * self.job.dtype.itemsize

    def case(self, order: Sequence[int]) -> _Case:
        """The cost if ``order`` has the layers from the most redundant one on."""
        scores = [float(order.index(layer)) for layer in range(len(order))]
        plan = choose_plan(self.job.config, scores, self.targets, self.parameters, self._prices)
        if plan.layers not in self._cases:
            self._cases[plan.layers] = self._case(plan)
        return self._cases[plan.layers]

    def _case(self, plan: Plan) -> _Case:
        job, config = self.job, self.job.config
        ranks = ceilings(config, plan)
        if config.threshold_ratio is not None:
            ranks = {target: break_even_rank(dense_shape(target.module), config.form) for target in ranks}
        if not ranks:
            other = self._tracer.base_bytes + forward_bytes(self._tracer, range(0), job.dtype)
            if config.bits is not None:
                other = max(other, quantizing_bytes(self._tracer))
            working = Memory(LIBRARY_BYTES, 0, 0, 0, 0, other, job.on_cpu)
            memory = self._with_states(working, self._stored_states([], ()), 0, self._checkpoint_bytes(0))
            return _Case(plan.layers, (), self._flops.count([], 0, 0), memory, working.peak)
        members = plan_sweeps(ranks, config.schedule)
        weights, stored = (
            {target: parameters_at(dense_shape(target.module), rank, form) for target, rank in ranks.items()}
            for form in ("factored", form_in_sweeps(config))
        )
        factors = 0 if config.decides_together else job.dtype.itemsize * sum(stored.values())
        gathered = 2 * job.dtype.itemsize * max(map(math.prod, self.shapes)) if job.sharded else 0
        extra = factors + gathered
        memories = [
            span_memory(
                *(self._tracer, targets, config, job.local_tokens),
                dtype=job.dtype,
                extra=extra,
                fetched=job.sharded,
            )
            for targets in members
        ]
        if self._budget is not None:
            max(memories, key=SpanMemory.least).plan(self._budget)  # raises with what all sweeps need
        plans = [memory.plan(memory.most() if self._budget is None else self._budget) for memory in memories]
        largest, spans = max(zip(memories, plans, strict=True), key=lambda pair: pair[0].most_of(pair[1]))
        layers, part = max(
            ((span.layers, part) for span in spans for part in span.parts), key=lambda s: largest.peak(*s)
        )
        working = Memory(
            fixed=largest.fixed - factors,
            factors=factors,
            sums=largest.sum_bytes(part),
            batch=largest.passing(layers),
            decomposition=largest.decomposing(part),
            other=largest.other,
            on_cpu=job.on_cpu,
        )
        sweeps = self._flops.sweeps(members, plans, ranks)
        prefix = self._flops.prefix(plans)
        removed = sum(parameters_removed(dense_shape(t.module), rank, config.form) for t, rank in plan.ranks.items())
        memory = self._with_states(
            working,
            states=self._stored_states(list(ranks), plans),
            stored=self._stored_bytes(members, weights, stored, working.sums),
            checkpoint=self._checkpoint_bytes(removed),
        )
        swept = sum(sweep.flops for sweep in sweeps)
        flops = self._flops.count(list(ranks), prefix, swept, compares=not plan.bits_suffice)
        return _Case(plan.layers, sweeps, flops, memory, max(memory.least() for memory in memories))

    def _stored_states(self, targets: Sequence[Target], plans: Sequence[Sequence[PlannedSpan]]) -> tuple[int, int]:
        """Bytes of the hidden states of all batches, in the sweeps, and in the refit or while weights are quantised.

        Sweeps have one where each sweep and each span starts, and one gradient between spans. The others have the
        streams, and the inputs of the linears of one layer. Each process quantises on all batches.
        """
        entries, most = {spans[-1].layers.start for spans in plans}, max(map(len, plans), default=1)
        number_bytes = self.job.local_tokens * self.job.sweep_dtype.itemsize
        sweeping = (len(entries) + most - (most == 1)) * self._tracer.width * number_bytes
        refitting = self._streams(targets) * number_bytes if self.job.config.refit else 0
        if self.job.config.bits is None:
            return sweeping, refitting
        every = [target for linears in self.targets.values() for target in linears]
        quantizing = self._streams(every) * self.job.num_samples * self.job.seq_len * self.job.dtype.itemsize
        return sweeping, max(refitting, quantizing)

    def _streams(self, targets: Collection[Target]) -> int:
        """Numbers for each token of the streams, and of the inputs of the linears of one layer."""
        inputs: dict[int, int] = defaultdict(int)
        for target in distinct_inputs(targets):
            inputs[target.layer] += dense_shape(target.module)[1]
        return REFIT_STREAMS * self._tracer.width + max(inputs.values()) if inputs else 0

    def _stored_bytes(
        self,
        members: Sequence[Sequence[Target]],
        groups: Mapping[Target, int],
        weights: Mapping[Target, int],
        sums: int,
    ) -> int:
        """What the run folder has: groups before ranks are decided, and low-rank linears; or sums, written anew."""
        job, total = self.job, sum(groups.values())
        if job.config.decides_together:
            cut = sum(weights.values()) if job.rounds > 1 else 0
            if job.config.narrows:  # an MLP at each width, at the chosen one, and whole
                downs = (dense_shape(target.module) for target in groups if is_down(target))
                cut = max(cut, sum(n * (sum(widths_of(k)) + 4 * k) for n, k in downs))
            return total * job.sum_bytes + job.dtype.itemsize * (cut + (total if job.config.refit else 0))
        sweep = max(sum(groups[target] for target in targets) for targets in members)
        return total * job.dtype.itemsize + max(2 * sums, sweep * job.sum_bytes)

    def _checkpoint_bytes(self, removed: int) -> int:
        """The weights that are saved. For a latency the ranks are not known: as many weights as before."""
        config, itemsize = self.job.config, self.job.dtype.itemsize
        if config.target_latency is not None:
            return self.parameters * itemsize
        if config.target_bytes is not None:
            return min(config.target_bytes, self.parameters * itemsize)
        return (self.parameters - removed) * itemsize

    def _with_states(self, working: Memory, states: tuple[int, int], stored: int, checkpoint: int) -> Memory:
        """Add the hidden states of all batches, in memory as far as the budget leaves some, then in files.

        Args:
            working: without hidden states.
            states: bytes of the hidden states in the sweeps and in the refit.
            stored: bytes of factors or sums in the run folder.
            checkpoint: bytes of the weights that are saved.
        """
        job, room = self.job, self._host_budget
        if job.on_cpu:
            room = None if self._budget is None else self._budget - working.peak
        sweeping, refitting = (count if room is None else min(count, max(0, room)) for count in states)
        # At the end the run folder has the low-rank linears, which the checkpoint has as well.
        spilled = job.processes * max(states[0] - sweeping, states[1] - refitting)
        disk = max(stored + spilled, 2 * checkpoint if stored else checkpoint)
        return replace(working, hidden_states=sweeping, refit_states=refitting, disk=disk)
