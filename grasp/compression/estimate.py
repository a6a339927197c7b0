"""Estimate what a compression costs before it runs: sweeps, FLOPs, memory and time. No weights are needed."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

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
from grasp.statistics.gradients import dense_is_cheaper
from grasp.statistics.loss import LOGITS_BYTES
from grasp.statistics.sweep import sweep_name
from grasp_kernels.routes import BLOCK_ROWS, dense_flops, factored_flops

# Workspaces of libraries, and free heap memory that glibc keeps: up to 64 MiB (the largest M_TRIM_THRESHOLD).
LIBRARY_BYTES = 2**26
# Forward passes through a layer per batch: dense, low-rank, and at most one more for its inputs.
REFIT_PASSES = 3.5


@dataclass(frozen=True)
class CompressionJob:
    """A compression to estimate.

    Args:
        model_config: configuration of the model; its weights are not needed.
        config: configuration of the compression. With ``threshold_ratio``, ranks are assumed to be at their upper
            bound, where the low-rank linear has as many parameters as the dense one.
        dtype: dtype of the weights.
        device: the device to run on.
        num_samples: calibration sequences.
        seq_len: tokens per sequence.
    """

    model_config: PreTrainedConfig
    config: GraspConfig
    dtype: torch.dtype
    device: torch.device
    num_samples: int
    seq_len: int

    @property
    def sweep_dtype(self) -> torch.dtype:
        """The dtype of the sweeps."""
        name = self.config.sweep_dtype
        return self.dtype if name is None else getattr(torch, name)

    @property
    def sum_bytes(self) -> int:
        """Bytes per number in a sum."""
        return max(4, self.dtype.itemsize)

    @property
    def tokens(self) -> int:
        """All calibration tokens."""
        return self.num_samples * self.seq_len

    @property
    def rounds(self) -> int:
        """How often all linears are scored."""
        return 2 if self.config.schedule == "progressive" else 1

    @property
    def has_moments(self) -> bool:
        """Whether the metric needs gradients."""
        return METRICS[self.config.metric].moment != "none"

    @property
    def passes_per_sweep(self) -> int:
        """How often a sweep runs over the calibration set: for covariances and for gradients, in each round."""
        return self.rounds * (BASES[self.config.basis].inputs + self.has_moments)


@dataclass(frozen=True)
class Flops:
    """Floating-point operations; a multiply-add counts as two."""

    block_influence: int = 0
    prefix: int = 0  # once, up to the redundant layers
    sweeps: int = 0  # forward, and backward in activations, including the head
    statistics: int = 0  # gradients in the singular values, covariances
    svd: int = 0
    refit: int = 0

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """Peak bytes above the loaded model, by use."""

    statistics: int  # sums of the linears of one sweep
    activations: int  # of one batch, from the forward to the backward pass
    temporaries: int  # in addition, during the backward pass of one layer
    logits: int  # in addition, before that: a slice with its gradient, and the gradient of the hidden states
    hidden_states: int  # inputs of the redundant layers for all batches, in CPU memory
    svd: int  # temporaries of one decomposition
    factors: int  # of the low-rank linears while the dense ones still exist
    weights_copy: int  # the model in ``sweep_dtype``, and weights that are replaced temporarily
    refit: int  # hidden states and inputs of one layer for all batches after the sweeps, in CPU memory
    offloads_hidden_states: bool  # whether the model is not in CPU memory

    @property
    def peak(self) -> int:
        """Peak on the device of the model. A decomposition runs after the activations of a sweep are freed.

        Temporaries count twice, because allocators keep freed blocks and reuse only a part of them.
        """
        passing = 2 * max(self.temporaries, self.logits) + LIBRARY_BYTES
        sweeping = self.activations + passing + self.weights_copy
        lasting = self.factors + (0 if self.offloads_hidden_states else self.hidden_states)
        refitting = 0 if self.offloads_hidden_states else self.refit
        return lasting + max(self.statistics + max(sweeping, self.svd), refitting + passing)


@dataclass(frozen=True)
class SweepCost:
    """One sweep over the calibration set."""

    name: str
    linears: int
    layers: int  # that run forward and backward
    flops: int  # forward and backward, without statistics


@dataclass(frozen=True)
class Estimate:
    """The cost of a compression.

    The redundant layers are known only after block influence is measured. Unless the configuration determines them,
    ``layers`` are the layers in the middle of the model, ``fewest`` and ``most`` are the FLOPs for the last and the
    first layers, and ``memory`` is the maximum of the three.

    Attributes:
        batch_size: sequences per forward pass.
        layers: layers to compress, ascending.
        assumed: whether ``layers`` is an assumption.
        sweeps: in their order.
        flops: for ``layers``.
        fewest: lower bound of the total FLOPs.
        most: upper bound of the total FLOPs.
        memory: bytes above the loaded model.
        model_bytes: bytes of the parameters of the model.
        largest_matrix: (N, K) of the largest linear that could be compressed.
    """

    batch_size: int
    layers: tuple[int, ...]
    assumed: bool
    sweeps: tuple[SweepCost, ...]
    flops: Flops
    fewest: int
    most: int
    memory: Memory
    model_bytes: int
    largest_matrix: Shape

    def seconds(self, rates: Rates) -> float:
        """Time at the given rates, of matrix products and decompositions only."""
        passes = self.flops.block_influence + self.flops.prefix + self.flops.sweeps + self.flops.refit
        return passes / rates.sweeps + self.flops.statistics / rates.statistics + self.flops.svd / rates.svd

    def to_dict(self) -> dict[str, Any]:
        """The estimate as a JSON object."""
        totals = {"flops": self.flops.total, "peak_bytes": self.memory.peak}
        return {**asdict(self), "layers": list(self.layers), "totals": totals}


def estimate(job: CompressionJob, batch_size: int = 1) -> Estimate:
    """Count what ``compress_`` costs by running layers on tensors without data (``grasp.compression.layer_cost``).

    Args:
        job: the compression.
        batch_size: sequences per forward pass.

    Raises:
        ValueError: if the configuration asks for layers or a ratio that the model does not have, or a number is not
            positive.
        CalibrationError: if the model has fewer positions than ``seq_len``.
        UnsupportedModelError: if there is nothing to compress, or the layers cannot run without data.
    """
    require_sizes(num_samples=job.num_samples, seq_len=job.seq_len, batch_size=batch_size)
    config, batch_size = job.config, min(batch_size, job.num_samples)
    tracer = Tracer(
        job.model_config, dtype=job.sweep_dtype, device=job.device, batch_size=batch_size, seq_len=job.seq_len
    )
    require_positions(tracer.model, [tracer.batch])
    depth = len(decoder(tracer.model).layers)
    check_layers(config, depth)
    estimator = _Estimator(job, tracer)
    middle = sorted(range(depth), key=lambda layer: abs(layer - (depth - 1) / 2))
    orders = [middle, list(reversed(range(depth))), list(range(depth))]  # from the most redundant layer on
    cases = [estimator.case(order) for order in (orders if config.layers is None else orders[:1])]
    totals = [case.flops.total for case in cases]
    return Estimate(
        batch_size=batch_size,
        layers=cases[0].layers,
        assumed=_is_upper_bound(config) or any(case.layers != cases[0].layers for case in cases),
        sweeps=cases[0].sweeps,
        flops=cases[0].flops,
        fewest=min(totals),
        most=max(totals),
        memory=max((case.memory for case in cases), key=lambda memory: memory.peak),
        model_bytes=estimator.parameters * job.dtype.itemsize,
        largest_matrix=max(_shapes([t for linears in estimator.targets.values() for t in linears]), key=math.prod),
    )


def _is_upper_bound(config: GraspConfig) -> bool:
    """Whether the number of layers depends on costs of decoding, which the estimate does not know."""
    return config.target_latency is not None and config.layers is None and config.scope != "model"


class _Case(NamedTuple):
    """The cost of a compression for one order of redundancy."""

    layers: tuple[int, ...]
    sweeps: tuple[SweepCost, ...]
    flops: Flops
    memory: Memory


class _Estimator:
    """A job, and its model without data."""

    def __init__(self, job: CompressionJob, tracer: Tracer) -> None:
        self._job, self._tracer = job, tracer
        self._layers = decoder(tracer.model).layers
        self.targets = eligible_targets(tracer.model)[0]
        self.parameters = model_size(tracer.model, self._layers).parameters
        self._prices = find_prices(replace(job.config, target_latency=None), tracer.model, self.targets)
        if job.config.target_latency is not None:  # the layers depend on costs: at most, all layers are compressed
            self._prices = replace(self._prices, saving=math.inf)
        self._vocabulary, self._width = tracer.model.get_output_embeddings().weight.shape
        self._batch_size, self._batch_tokens = len(tracer.batch.input_ids), tracer.batch.input_ids.numel()
        self._states_bytes = self._batch_tokens * self._width * job.sweep_dtype.itemsize  # hidden states of one batch

    def case(self, order: Sequence[int]) -> _Case:
        """The cost if ``order`` has the layers from the most redundant one on."""
        job, scores = self._job, [float(order.index(layer)) for layer in range(len(order))]
        plan = choose_plan(job.config, scores, self.targets, self.parameters, self._prices)
        ranks = ceilings(job.config, plan)
        if job.config.threshold_ratio is not None:
            ranks = {target: break_even_rank(dense_shape(target.module)) for target in ranks}
        members = plan_sweeps(ranks, job.config.schedule)
        sweeps, batch_bytes = self._trace_sweeps(members, ranks)
        entries = {min(target.layer for target in targets) for targets in members}
        flops = Flops(
            block_influence=self._forward_flops(range(len(self._layers))),
            prefix=self._forward_flops(range(max(entries, default=0))),
            sweeps=job.passes_per_sweep * sum(sweep.flops for sweep in sweeps),
            statistics=job.rounds * _statistics_flops(job, list(ranks)),
            svd=job.rounds * sum(map(svd_flops, _shapes(ranks))),
            refit=self._refit_flops(list(ranks)) if job.config.refit and ranks else 0,
        )
        return _Case(plan.layers, sweeps, flops, self._memory(members, ranks, batch_bytes, len(entries)))

    def _trace_sweeps(
        self, members: Sequence[Sequence[Target]], ranks: Mapping[Target, int]
    ) -> tuple[tuple[SweepCost, ...], tuple[int, int]]:
        """Run the layers of all sweeps without data; the largest activations and temporaries of a batch."""
        costs = [self._tracer.layer(layer, "none") for layer in range(len(self._layers))]
        base_bytes = self._tracer.base_bytes + self._states_bytes
        batch_bytes = [(base_bytes, max(cost.saved + cost.transient for cost in costs))]  # of block influence
        replaced: dict[int, dict[str, int]] = defaultdict(dict)
        head = 2 * 2 * self._job.num_samples * (self._job.seq_len - 1) * self._vocabulary * self._width
        sweeps = []
        for targets in members:
            costs = self._trace(targets, replaced)
            body = self._for_all_batches(sum(cost.forward + cost.backward for cost in costs))
            sweeps.append(SweepCost(sweep_name(targets), len(targets), len(costs), body + head))
            backward = max(cost.transient for cost in costs) + self._visit_bytes(targets) + self._states_bytes
            batch_bytes.append((base_bytes + sum(cost.saved for cost in costs), backward))
            for target in targets:
                replaced[target.layer][target.name] = ranks[target]
        return tuple(sweeps), max(batch_bytes, key=sum)

    def _trace(self, targets: Sequence[Target], replaced: Mapping[int, Mapping[str, int]]) -> list[LayerCost]:
        """The layers of one sweep for one batch; ``replaced`` has the ranks of earlier sweeps, by layer and name."""
        first = min(target.layer for target in targets)
        return [
            self._tracer.layer(
                layer,
                "starts" if layer == first else "enters",
                visited=[target for target in targets if target.layer == layer],
                ranks=replaced.get(layer),
            )
            for layer in range(first, len(self._layers))
        ]

    def _for_all_batches(self, flops: int) -> int:
        return flops * self._job.num_samples // self._batch_size

    def _forward_flops(self, layers: range) -> int:
        return sum(self._for_all_batches(self._tracer.layer(layer, "none").forward) for layer in layers)

    def _refit_flops(self, targets: Sequence[Target]) -> int:
        layers = range(min(target.layer for target in targets), max(target.layer for target in targets) + 1)
        products = 2 * 2 * self._job.tokens * covariance_bytes(targets, outputs=False) // self._job.sum_bytes
        return int(REFIT_PASSES * self._forward_flops(layers)) + products

    def _refit_bytes(self, targets: Sequence[Target]) -> int:
        """Three times the hidden states, and the inputs of the linears of one layer."""
        inputs: dict[int, int] = defaultdict(int)
        for target in distinct_inputs(targets):
            inputs[target.layer] += dense_shape(target.module)[1]
        return self._job.tokens * self._job.sweep_dtype.itemsize * (3 * self._width + max(inputs.values(), default=0))

    def _logits_bytes(self) -> int:
        """A slice of logits in fp32 with its gradient, and the hidden states and gradients beside it."""
        rows = min(max(1, LOGITS_BYTES // (4 * self._vocabulary)), self._batch_tokens)
        return 2 * rows * self._vocabulary * max(4, self._job.sweep_dtype.itemsize) + 3 * self._states_bytes

    def _visit_bytes(self, targets: Sequence[Target]) -> int:
        """Temporaries of adding one call to a sum: tokens converted to fp32, and a part of the product."""
        converted = 0 if self._job.sweep_dtype.itemsize >= 4 else 4 * self._batch_tokens
        return max(converted * (n + k) + 4 * BLOCK_ROWS * k for n, k in _shapes(targets))

    def _memory(
        self,
        members: Sequence[Sequence[Target]],
        ranks: Mapping[Target, int],
        batch_bytes: tuple[int, int],
        entries: int,
    ) -> Memory:
        job, shapes = self._job, _shapes(ranks)
        copied = 0 if job.dtype == job.sweep_dtype else self.parameters * job.sweep_dtype.itemsize
        if job.rounds > 1:  # products of factors replace the weights temporarily
            copied += job.dtype.itemsize * sum(map(math.prod, shapes))
        # The candidates of a global budget are not rounded to the dtype of the model; "progressive" has two sets.
        factor_bytes = job.rounds * job.sum_bytes if job.config.decides_together else job.dtype.itemsize
        return Memory(
            statistics=max((_statistics_bytes(job, targets) for targets in members), default=0),
            activations=batch_bytes[0],
            temporaries=batch_bytes[1],
            logits=self._logits_bytes() if members else 0,
            hidden_states=entries * job.tokens * self._width * job.sweep_dtype.itemsize,
            svd=max((job.sum_bytes * _svd_numbers(shape) for shape in shapes), default=0),
            factors=factor_bytes * sum(r * (n + k) for (n, k), r in zip(shapes, ranks.values(), strict=True)),
            weights_copy=copied,
            refit=self._refit_bytes(list(ranks)) if job.config.refit and ranks else 0,
            offloads_hidden_states=job.device.type != "cpu",
        )


def _shapes(targets: Collection[Target]) -> list[Shape]:
    return [dense_shape(target.module) for target in targets]


def _statistics_flops(job: CompressionJob, targets: Sequence[Target]) -> int:
    """FLOPs of the gradients in the singular values, and of one half of each symmetric covariance."""
    basis, flops = BASES[job.config.basis], 0
    if job.has_moments:
        for n, k in _shapes(targets):
            work = (job.tokens, n, k, min(n, k))
            flops += min(dense_flops(*work), factored_flops(*work))
    covariances = covariance_bytes(targets, outputs=basis.outputs) if basis.inputs else 0
    return flops + job.tokens * covariances // job.sum_bytes


def _statistics_bytes(job: CompressionJob, targets: Sequence[Target]) -> int:
    """The sums of one sweep: covariances, or the gradient of each weight, or its decomposition and their gradients."""
    basis = BASES[job.config.basis]
    if basis.inputs:
        return covariance_bytes(targets, outputs=basis.outputs)
    numbers = (n * k if dense_is_cheaper((n, k), job.tokens) else min(n, k) * (n + k + 2) for n, k in _shapes(targets))
    return job.sum_bytes * sum(numbers)


def _svd_numbers(shape: Shape) -> int:
    """Numbers in the divide and conquer SVD of LAPACK: two copies of the matrix, factors twice, and its workspace."""
    n, k = shape
    r = min(shape)
    return 2 * n * k + 2 * r * (n + k) + 8 * r * r
