"""The floating-point operations of a compression, counted on layers without data."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from grasp.compression.candidates import HELD_OUT, MEASURED_TOKENS
from grasp.compression.eligible import eligible_targets
from grasp.compression.job import CompressionJob
from grasp.compression.layer_cost import Tracer
from grasp.compression.memory import form_in_sweeps, is_down, projected_outputs, retained_groups
from grasp.compression.span_plan import PlannedSpan
from grasp.config import GraspConfig
from grasp.method.basis import BASES
from grasp.method.channels import narrow_flops
from grasp.method.least_squares import fit_weight_flops, least_squares_flops, products_flops
from grasp.method.metrics import METRICS
from grasp.method.ranks import Shape, break_even_rank
from grasp.method.rounding import rounding_flops
from grasp.method.svd import decomposition_flops
from grasp.model.dense import dense_shape
from grasp.model.targets import Target, decoder, vocabulary_size
from grasp.statistics.covariance import covariance_bytes
from grasp.statistics.divergence import STUDENTS
from grasp.statistics.sweep import sweep_name
from grasp_kernels.routes import dense_flops, factored_flops

CANDIDATES = 8  # that are compared, about
# Forward passes through a layer per batch: dense, low-rank (or quantised), and at most one more for its inputs.
REFIT_PASSES = 3.5


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of all processes; a multiply-add counts as two."""

    block_influence: int = 0
    prefix: int = 0  # up to the redundant layers, or to the deepest span in each round
    sweeps: int = 0  # forward, and backward in activations, including the head
    statistics: int = 0  # gradients in the singular values, covariances
    decompositions: int = 0
    held_out: int = 0  # losses of candidates on held-out sequences
    refit: int = 0  # forward passes
    refit_sums: int = 0
    refit_solutions: int = 0
    quantizing: int = 0  # forward passes, and second moments of the inputs
    rounding: int = 0

    @property
    def total(self) -> int:
        """The sum of all."""
        return sum(vars(self).values())


@dataclass(frozen=True)
class SweepCost:
    """One pass over the calibration set, forward and backward."""

    name: str
    linears: int
    layers: int  # that run
    spans: int  # ranges of layers that run one after the other
    runs: int  # a layer whose sums do not fit together runs several times
    flops: int  # without statistics


class FlopCounter:
    """Counts the operations of a job.

    Args:
        job: the compression.
        tracer: its model without data.
    """

    def __init__(self, job: CompressionJob, tracer: Tracer) -> None:
        self._job, self._tracer = job, tracer
        self._layers, self._batch_size = decoder(tracer.model).layers, len(tracer.batch.input_ids)
        self._held_out = -(-job.num_samples // HELD_OUT)

    def sweeps(
        self,
        members: Sequence[Sequence[Target]],
        plans: Sequence[Sequence[PlannedSpan]],
        ranks: Mapping[Target, int],
    ) -> tuple[SweepCost, ...]:
        """Run the layers of all sweeps without data. Each sees the low-rank linears of those before."""
        replaced: dict[int, dict[str, int]] = defaultdict(dict)
        sweeps = []
        for targets, spans in zip(members, plans, strict=True):
            runs = [(span.layers, part) for span in spans for part in span.parts]
            body = sum(self._span_flops(spans[-1].layers.start, *run, replaced) for run in runs)
            sweeps.append(
                SweepCost(
                    name=sweep_name(targets),
                    linears=len(targets),
                    layers=sum(len(span.layers) for span in spans),
                    spans=len(spans),
                    runs=len(runs),
                    flops=self._for_calibration(body) + len(spans[0].parts) * self._head_flops(),
                )
            )
            for target in targets:
                replaced[target.layer][target.name] = ranks[target]
        return tuple(sweeps)

    def _span_flops(
        self, lowest: int, layers: range, part: Collection[Target], replaced: Mapping[int, Mapping[str, int]]
    ) -> int:
        """The FLOPs of one batch, forward and backward."""
        costs = [
            self._tracer.layer(
                layer,
                "starts" if layer == lowest else "enters",
                visited=[target for target in part if target.layer == layer],
                ranks=replaced.get(layer),
                form=form_in_sweeps(self._job.config),
            )
            for layer in layers
        ]
        return sum(cost.forward + cost.backward for cost in costs)

    def prefix(self, plans: Sequence[Sequence[PlannedSpan]]) -> int:
        """The layers below all sweeps once, and in each round of a sweep the layers below its deepest span."""
        entries = [spans[-1].layers.start for spans in plans]
        again = sum(
            self._forward(range(entry, spans[0].layers.start)) for entry, spans in zip(entries, plans, strict=True)
        )
        return self._for_calibration(self._forward(range(max(entries))) + self._job.rounds * again)

    def count(self, targets: Sequence[Target], prefix: int, sweeps: int, *, compares: bool = True) -> Flops:
        """The FLOPs of all steps.

        Args:
            targets: the linears that are scored.
            prefix: FLOPs of ``prefix``.
            sweeps: FLOPs of one pass of each sweep.
            compares: whether several candidates are measured.
        """
        job = self._job
        depth = range(len(self._layers))
        influence = self._for_samples(self._forward(depth), job.num_samples)
        quantizing = {} if job.config.bits is None else self._quantizing()
        if not targets:
            return Flops(block_influence=influence, **quantizing)
        body, head = self._for_samples(self._forward(depth), self._held_out), self._head_flops(self._held_out) // 2
        # On few tokens each block of each layer is low-rank, and each layer is removed alone, then several, as often:
        # on the average from the middle of the layers, and for every few of them with the head of the dense model too.
        # Where MLPs may lose channels for a latency, layers are removed before and after.
        again = job.config.narrows and job.config.target_latency is not None
        alone = (2 + again) * 2 * len(depth) * (body // 2 + head + head // STUDENTS)
        tokens = self._held_out * job.seq_len
        held_out = CANDIDATES * (body + head) + alone * min(tokens, MEASURED_TOKENS) // tokens
        held_out += 2 * influence  # a linear map
        flops = Flops(
            block_influence=influence,
            prefix=prefix,
            sweeps=job.passes_per_sweep * sweeps,
            statistics=job.rounds * _statistics_flops(job, self._tokens, targets),
            decompositions=job.rounds * sum(_decomposition_flops(job.config, target) for target in targets)
            + sum(narrow_flops(dense_shape(t.module)) for t in targets if job.config.narrows and is_down(t)),
            held_out=held_out if job.config.decides_together and compares else 0,
            **quantizing,
        )
        if not job.config.refit:
            return flops
        layers = range(min(target.layer for target in targets), max(target.layer for target in targets) + 1)
        passes, sums = self._two_streams(layers, targets)
        ranks = [(shape, break_even_rank(shape, job.config.form)) for shape in _shapes(targets)]
        return replace(
            flops,
            refit=passes,
            refit_sums=sums + self._tokens // 2 * sum(products_flops(*each) for each in ranks),
            refit_solutions=sum(least_squares_flops(*each) for each in ranks),
        )

    def _quantizing(self) -> dict[str, int]:
        """Both streams of hidden states and their sums, and the rounding of each linear."""
        targets = [target for linears in eligible_targets(self._tracer.model)[0].values() for target in linears]
        rounding = sum(rounding_flops(shape) + fit_weight_flops(shape) for shape in _shapes(targets))
        return {"quantizing": sum(self._two_streams(range(len(self._layers)), targets)), "rounding": rounding}

    def _two_streams(self, layers: range, targets: Sequence[Target]) -> tuple[int, int]:
        """The passes of a refit or a quantisation through some layers, and two sums of each input, one symmetric."""
        passes = int(REFIT_PASSES * self._for_calibration(self._forward(layers)))
        return passes, 3 * self._tokens * covariance_bytes(targets, outputs=False) // self._job.sum_bytes

    @property
    def _tokens(self) -> int:
        """The tokens that statistics are taken of."""
        return self._job.num_samples * self._job.seq_len

    def _for_calibration(self, flops: int) -> int:
        return self._for_samples(flops, self._job.num_samples)

    def _for_samples(self, flops: int, samples: int) -> int:
        """The FLOPs of some sequences, from those of one batch."""
        return flops * samples // self._batch_size

    def _forward(self, layers: range) -> int:
        """The FLOPs of one batch through some layers."""
        return sum(self._tracer.layer(layer, "none").forward for layer in layers)

    def _head_flops(self, samples: int | None = None) -> int:
        """The logits of all calibration tokens but the last of each sequence, forward and backward."""
        samples = self._job.num_samples if samples is None else samples
        return 2 * 2 * samples * (self._job.seq_len - 1) * vocabulary_size(self._tracer.model) * self._tracer.width


def _shapes(targets: Collection[Target]) -> list[Shape]:
    return [dense_shape(target.module) for target in targets]


def _statistics_flops(job: CompressionJob, tokens: int, targets: Sequence[Target]) -> int:
    """FLOPs of the gradients in the singular values, and of one half of each symmetric covariance."""
    basis, flops = BASES[job.config.basis], 0
    if job.has_moments:
        plain = not basis.inputs and METRICS[job.config.metric].moment == "first"  # else ``basis_moments``
        for n, k in _shapes(targets):
            work = (tokens, n, k, min(n, k))
            flops += min(dense_flops(*work), factored_flops(*work)) if plain else factored_flops(*work)
    if basis.inputs:
        flops += tokens * covariance_bytes(targets, outputs=False) // job.sum_bytes
    if basis.outputs:
        projected = projected_outputs(targets, job.config)
        for target in targets:
            n, k = dense_shape(target.module)
            flops += tokens * (2 * n * k + k * k if target in projected else n * n)
    return flops


def _decomposition_flops(config: GraspConfig, target: Target) -> int:
    basis, shape = BASES[config.basis], dense_shape(target.module)
    rounding = 0 if config.fewest_bits is None else rounding_flops(shape)
    return rounding + decomposition_flops(
        shape,
        inputs=basis.inputs,
        outputs=basis.outputs,
        projected=target in projected_outputs([target], config),
        rank=retained_groups(config, shape),
    )
