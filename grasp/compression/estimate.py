"""What a compression will cost, before it is run: sweeps, FLOPs, memory and time. No weights are needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedConfig

from grasp.calibration import require_sizes
from grasp.compression.budget import ceilings, choose_plan, find_prices
from grasp.compression.device_speed import Rates, svd_flops
from grasp.compression.eligible import check_layers, eligible_targets, require_positions
from grasp.compression.layer_cost import LayerCost, Tracer
from grasp.config import GraspConfig
from grasp.method.basis import BASES
from grasp.method.metrics import METRICS
from grasp.method.ranks import Shape, break_even_rank
from grasp.method.schedules import plan_sweeps
from grasp.model.dense import dense_shape
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder
from grasp.statistics.covariance import covariance_bytes, distinct_inputs
from grasp.statistics.gradients import gradient_route
from grasp.statistics.loss import LOGITS_BYTES
from grasp.statistics.sweep import sweep_name
from grasp_kernels.routes import BLOCK_ROWS, dense_flops, factored_flops

# Workspaces of libraries, and what glibc keeps of a heap that shrinks: up to 64 MiB (M_TRIM_THRESHOLD at its largest).
LIBRARY_BYTES = 2**26
# Of a layer, for each batch: dense, low-rank, and up to each of its inputs once more.
REFIT_PASSES = 3.5


@dataclass(frozen=True)
class Flops:
    """Floating-point operations, a multiply and an add counted as two."""

    block_influence: int = 0
    prefix: int = 0  # up to the redundant layers, once
    sweeps: int = 0  # forward and backward in activations, the head included
    statistics: int = 0  # gradients in the singular values, covariances
    svd: int = 0
    refit: int = 0

    @property
    def total(self) -> int:
        """All together."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """Bytes above the loaded model, each the most at any time."""

    statistics: int  # of the linears of one sweep
    activations: int  # of one batch, from the forward pass until the backward pass
    temporaries: int  # beyond those, of one layer's backward pass
    logits: int  # beyond those, before: a slice with its gradient, and the gradient of the hidden states
    hidden_states: int  # those that enter the redundant layers, kept for all batches in CPU memory
    svd: int  # temporaries of one decomposition
    factors: int  # of the low-rank linears, while the dense ones are still there
    weights_copy: int  # the model in ``sweep_dtype``, and weights that others stand in for
    refit: int  # hidden states and the inputs of one layer, kept for all batches in CPU memory when sweeps are over
    offloads_hidden_states: bool  # the model is elsewhere than in CPU memory

    @property
    def peak(self) -> int:
        """The most at any time where the model is; decompositions come when the activations of a sweep are gone.

        What comes and goes counts twice, for allocators keep freed blocks and do not find all of them again.
        """
        passing = 2 * max(self.temporaries, self.logits) + LIBRARY_BYTES
        sweeping = self.activations + passing + self.weights_copy
        kept = self.factors + (0 if self.offloads_hidden_states else self.hidden_states)
        refitting = 0 if self.offloads_hidden_states else self.refit
        return kept + max(self.statistics + max(sweeping, self.svd), refitting + passing)


@dataclass(frozen=True)
class SweepPlan:
    """One sweep over the calibration set: its linears, and how many layers it runs, forward and backward."""

    name: str
    linears: int
    layers: int
    flops: int  # forward and backward; not those of the statistics


@dataclass(frozen=True)
class Estimate:
    """What ``compress_`` will do.

    Which layers are redundant is not known before block influence is measured. Where the configuration does not say,
    ``layers`` are assumed to be those in the middle of the model; ``fewest`` and ``most`` are the FLOPs if they are the
    last and the first ones, and memory is that of the dearest of the three.

    Attributes:
        batch_size: sequences in a forward pass.
        layers: those that are compressed, ascending.
        assumed: whether ``layers`` is a guess.
        sweeps: in their order.
        flops: for ``layers``.
        fewest: total FLOPs, at least.
        most: total FLOPs, at most.
        memory: bytes above the loaded model.
        model_bytes: the model's parameters.
        largest_matrix: (N, K) of the largest linear that could be compressed.
    """

    batch_size: int
    layers: tuple[int, ...]
    assumed: bool
    sweeps: tuple[SweepPlan, ...]
    flops: Flops
    fewest: int
    most: int
    memory: Memory
    model_bytes: int
    largest_matrix: Shape

    def seconds(self, rates: Rates) -> float:
        """Time at the given rates. All but matrix products and decompositions is left out."""
        passes = self.flops.block_influence + self.flops.prefix + self.flops.sweeps + self.flops.refit
        return passes / rates.sweeps + self.flops.statistics / rates.statistics + self.flops.svd / rates.svd

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        totals = {"flops": self.flops.total, "peak_bytes": self.memory.peak}
        return {**asdict(self), "layers": list(self.layers), "totals": totals}


@dataclass(frozen=True)
class Job:
    """What is to be compressed, how and where.

    Args:
        model_config: the model's; its weights are not needed.
        config: what to compress and how. With ``threshold_ratio`` ranks are assumed to break even, the highest there
            can be.
        dtype: of the model's weights.
        device: where it is to run.
        num_samples: calibration sequences.
        seq_len: tokens in each.
    """

    model_config: PreTrainedConfig
    config: GraspConfig
    dtype: torch.dtype
    device: torch.device
    num_samples: int
    seq_len: int

    @property
    def sweep_dtype(self) -> torch.dtype:
        """In which the model runs."""
        name = self.config.sweep_dtype
        return self.dtype if name is None else getattr(torch, name)


def estimate(job: Job, batch_size: int = 1) -> Estimate:
    """Count what ``compress_`` costs by running layers on tensors without data (``grasp.compression.layer_cost``).

    Args:
        job: what to estimate.
        batch_size: sequences in a forward pass.

    Raises:
        ValueError: if the configuration asks for layers or a ratio that the model does not have, or a number is not
            positive.
        CalibrationError: if the model has fewer positions than ``seq_len``.
        UnsupportedModelError: if there is nothing to compress, or the layers cannot be run without data.
    """
    require_sizes(num_samples=job.num_samples, seq_len=job.seq_len, batch_size=batch_size)
    tracer = Tracer(
        job.model_config,
        dtype=job.sweep_dtype,
        device=job.device,
        batch_size=min(batch_size, job.num_samples),
        seq_len=job.seq_len,
    )
    require_positions(tracer.model, [tracer.batch])
    planner = _Planner(job, tracer)
    orders = planner.orders if job.config.layers is None else planner.orders[:1]
    plans = [planner.plan(order) for order in orders]
    totals = [plan.flops.total for plan in plans]
    return replace(
        plans[0],
        assumed=len({plan.layers for plan in plans}) > 1,
        fewest=min(totals),
        most=max(totals),
        memory=max((plan.memory for plan in plans), key=lambda memory: memory.peak),
    )


class _Planner:
    """A model without data and what is to be done to it: FLOPs of the whole calibration set, bytes of one batch."""

    def __init__(self, job: Job, tracer: Tracer) -> None:
        self._job, self._tracer = job, tracer
        self._batch_size = len(tracer.batch.input_ids)
        self._tokens = self._batch_size * job.seq_len  # of a batch
        self._itemsize = job.sweep_dtype.itemsize
        self._layers = decoder(tracer.model).layers
        self._wide = max(4, job.dtype.itemsize)  # bytes of a number in a sum
        self._form, self._moment = BASES[job.config.basis], METRICS[job.config.metric].moment
        check_layers(job.config, len(self._layers))
        self._targets = eligible_targets(tracer.model)[0]
        self._total = model_size(tracer.model, self._layers)
        config = replace(job.config, target_latency=None)
        self._prices = find_prices(config, tracer.model, self._targets)
        if config != job.config:  # which layers a latency takes, no one knows without costs: all of them, at most
            self._prices = replace(self._prices, saving=math.inf)
        self._vocabulary, self._width = tracer.model.get_output_embeddings().weight.shape

    @property
    def orders(self) -> tuple[list[int], ...]:
        """Which layers could be the most redundant ones: those in the middle, the last, the first."""
        depth = len(self._layers)
        middle = sorted(range(depth), key=lambda layer: abs(layer - (depth - 1) / 2))
        return middle, list(reversed(range(depth))), list(range(depth))

    def plan(self, order: Sequence[int]) -> Estimate:
        """The estimate if layers are redundant in this order."""
        scores = [0.0] * len(order)
        for place, layer in enumerate(order):
            scores[layer] = float(place)
        config = self._job.config
        chosen = choose_plan(config, scores, self._targets, self._total.parameters, self._prices)
        ranks = {target: self._rank(target, rank) for target, rank in ceilings(config, chosen).items()}
        members = plan_sweeps(ranks, self._job.config.schedule)
        replaced: dict[int, dict[str, int]] = defaultdict(dict)
        plans, bytes_of_a_batch = [], [self._forward_bytes()]
        for targets in members:
            plan, size = self._sweep(targets, replaced)
            plans.append(plan)
            bytes_of_a_batch.append(size)
            for target in targets:
                replaced[target.layer][target.name] = ranks[target]
        entries = {min(target.layer for target in targets) for targets in members}
        forward = self._forward_flops
        return Estimate(
            batch_size=self._batch_size,
            layers=chosen.layers,
            assumed=False,
            sweeps=tuple(plans),
            flops=Flops(
                block_influence=sum(map(forward, range(len(self._layers)))),
                prefix=sum(map(forward, range(max(entries, default=0)))),
                sweeps=self._times_swept * sum(plan.flops for plan in plans),
                statistics=self._rounds * self._statistics_flops(list(ranks)),
                svd=self._rounds * sum(svd_flops(dense_shape(t.module)) for t in ranks),
                refit=self._refit_flops(list(ranks)) if config.refit and ranks else 0,
            ),
            fewest=0,
            most=0,
            memory=self._memory(members, ranks, bytes_of_a_batch, len(entries)),
            model_bytes=self._total.parameters * self._job.dtype.itemsize,
            largest_matrix=max((s for found in self._targets.values() for s in _shapes(found)), key=math.prod),
        )

    @property
    def _all_tokens(self) -> int:
        return self._job.num_samples * self._job.seq_len

    @property
    def _rounds(self) -> int:
        """How often everything is scored."""
        return 2 if self._job.config.schedule == "progressive" else 1

    @property
    def _times_swept(self) -> int:
        """How often the calibration set is swept for the same linears: for covariances, and for moments."""
        return self._rounds * (self._form.inputs + (self._moment != "none"))

    def _statistics_flops(self, targets: Sequence[Target]) -> int:
        tokens, moments = self._all_tokens, 0
        if self._moment != "none":
            moments = sum(statistics_flops(shape, tokens) for shape in _shapes(targets))
        covariances = covariance_bytes(targets, outputs=self._form.outputs) if self._form.inputs else 0
        return moments + tokens * covariances // self._wide  # half of each is computed, and mirrored

    def _refit_flops(self, targets: Sequence[Target]) -> int:
        layers = range(min(target.layer for target in targets), max(target.layer for target in targets) + 1)
        products = 2 * 2 * self._all_tokens * covariance_bytes(targets, outputs=False) // self._wide
        return int(REFIT_PASSES * sum(map(self._forward_flops, layers))) + products

    def _refit_bytes(self, targets: Sequence[Target]) -> int:
        """Three times the hidden states, and what enters the linears of one layer."""
        inputs: dict[int, int] = defaultdict(int)
        for target in distinct_inputs(targets):
            inputs[target.layer] += dense_shape(target.module)[1]
        return self._all_tokens * self._itemsize * (3 * self._width + max(inputs.values(), default=0))

    def _statistics_bytes(self, targets: Sequence[Target]) -> int:
        """The sums of the linears of one sweep."""
        if self._form.inputs:
            return covariance_bytes(targets, outputs=self._form.outputs)
        return self._wide * _statistics_numbers(_shapes(targets), self._all_tokens)

    def _rank(self, target: Target, rank: int) -> int:
        return rank if self._job.config.threshold_ratio is None else break_even_rank(dense_shape(target.module))

    def _all(self, flops_of_a_batch: int) -> int:
        """The same for all samples."""
        return flops_of_a_batch * self._job.num_samples // self._batch_size

    def _forward_flops(self, layer: int) -> int:
        return self._all(self._tracer.layer(layer, "none").forward)

    def _forward_bytes(self) -> tuple[int, int]:
        """Activations and temporaries of a forward pass alone."""
        costs = [self._tracer.layer(layer, "none") for layer in range(len(self._layers))]
        kept = self._tracer.base_bytes + self._states_bytes()
        return kept, max(cost.saved + cost.transient for cost in costs)

    def _states_bytes(self) -> int:
        """The hidden states of one batch."""
        return self._tokens * self._width * self._itemsize

    def _sweep(
        self, targets: Sequence[Target], replaced: dict[int, dict[str, int]]
    ) -> tuple[SweepPlan, tuple[int, int]]:
        """One sweep; the activations and temporaries of a batch in it."""
        first = min(target.layer for target in targets)
        costs: list[LayerCost] = []
        for layer in range(first, len(self._layers)):
            visited = [target for target in targets if target.layer == layer]
            graph = "starts" if layer == first else "enters"
            costs.append(self._tracer.layer(layer, graph, visited=visited, ranks=replaced[layer]))  # type: ignore[arg-type]
        body = self._all(sum(cost.forward + cost.backward for cost in costs))
        predicted = self._job.num_samples * (self._job.seq_len - 1)
        head = 2 * 2 * predicted * self._vocabulary * self._width
        plan = SweepPlan(sweep_name(targets), len(targets), len(costs), body + head)
        saved = self._tracer.base_bytes + sum(cost.saved for cost in costs) + self._states_bytes()
        backward = max(cost.transient for cost in costs) + self._widened_bytes(targets) + self._states_bytes()
        return plan, (saved, backward)

    def _logits_bytes(self) -> int:
        """A slice of logits in fp32, and its gradient."""
        rows = min(max(1, LOGITS_BYTES // (4 * self._vocabulary)), self._tokens)
        return 2 * rows * self._vocabulary * max(4, self._itemsize)

    def _widened_bytes(self, targets: Sequence[Target]) -> int:
        """What adding one call to a sum takes: tokens in fp32 where they are not, and a part of the product."""
        wide = 0 if self._itemsize >= 4 else 4
        return max(wide * self._tokens * (n + k) + 4 * BLOCK_ROWS * k for n, k in _shapes(targets))

    def _memory(
        self,
        members: Sequence[Sequence[Target]],
        ranks: dict[Target, int],
        bytes_of_a_batch: Sequence[tuple[int, int]],
        entries: int,
    ) -> Memory:
        job, all_tokens = self._job, self._all_tokens
        factors = sum(rank * (n + k) for (n, k), rank in zip(_shapes(list(ranks)), ranks.values(), strict=True))
        activations, temporaries = max(bytes_of_a_batch, key=sum)
        logits = self._logits_bytes() + 3 * self._states_bytes() if members else 0
        copied = 0 if job.dtype == job.sweep_dtype else self._total.parameters * self._itemsize
        if self._rounds > 1:  # products of factors stand in for weights
            copied += job.dtype.itemsize * sum(map(math.prod, _shapes(list(ranks))))
        return Memory(
            statistics=max(map(self._statistics_bytes, members), default=0),
            activations=activations,
            temporaries=temporaries,
            logits=logits,
            hidden_states=entries * all_tokens * self._width * self._itemsize,
            svd=max((self._wide * _svd_numbers(shape) for shape in _shapes(list(ranks))), default=0),
            # What a global budget chooses from is not rounded, and was chosen twice where it is progressive.
            factors=factors * (self._rounds * self._wide if job.config.decides_together else job.dtype.itemsize),
            weights_copy=copied,
            refit=self._refit_bytes(list(ranks)) if job.config.refit and ranks else 0,
            offloads_hidden_states=job.device.type != "cpu",
        )


def _shapes(targets: Sequence[Target]) -> list[Shape]:
    return [dense_shape(target.module) for target in targets]


def statistics_flops(shape: Shape, tokens: int) -> int:
    """FLOPs of the gradient in all singular values of one (N, K) matrix, over all ``tokens``."""
    count = dense_flops if gradient_route(shape, tokens) == "dense" else factored_flops
    return count(tokens, *shape, min(shape))


def _statistics_numbers(shapes: Sequence[Shape], tokens: int) -> int:
    """Numbers that the sums of some matrices hold: G, or the decomposition and the gradient."""
    return sum(n * k if gradient_route((n, k), tokens) == "dense" else min(n, k) * (n + k + 2) for n, k in shapes)


def _svd_numbers(shape: Shape) -> int:
    """Numbers held by LAPACK's divide and conquer: two copies of the matrix, factors twice, and its workspace."""
    n, k = shape
    r = min(shape)
    return 2 * n * k + 2 * r * (n + k) + 8 * r * r
