"""What the steps of a compression take above the loaded model, in bytes on its device."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import nn

from grasp.compression.eligible import eligible_targets
from grasp.compression.layer_cost import Graph, Tracer
from grasp.compression.span_plan import LayerNeeds, SpanMemory
from grasp.config import GraspConfig
from grasp.method.basis import BASES
from grasp.method.channels import narrow_bytes
from grasp.method.least_squares import least_squares_bytes, products_bytes
from grasp.method.metrics import METRICS
from grasp.method.pivoting import pivot_bytes
from grasp.method.ranks import Form, Shape, break_even_rank, parameters_at
from grasp.method.rounding import rounding_bytes
from grasp.method.svd import decomposition_bytes
from grasp.model.dense import dense_shape
from grasp.model.narrowing import DOWN
from grasp.model.targets import Target, decoder, vocabulary_size
from grasp.statistics.covariance import covariance_bytes, is_projected_cheaper, item_bytes
from grasp.statistics.gradients import dense_is_cheaper
from grasp.statistics.loss import slice_rows
from grasp_kernels.products import panel

LIBRARY_BYTES = 2**26  # workspaces of libraries, and what the allocator keeps between two ``return_freed_memory``
# oneDNN keeps the code of products of 16-bit numbers on a CPU: 0.55 to 0.75 MB were measured for each of 1024 shapes.
CODE_BYTES, CODE_SHAPES = 650_000, "ONEDNN_PRIMITIVE_CACHE_CAPACITY"
READ_COPIES = 3  # of factors: as they are read, those of the rank, and those with the singular values folded in
# Allocators keep freed blocks and reuse only a part of them.
FRAGMENTATION = 2


def span_memory(
    tracer: Tracer,
    targets: Collection[Target],
    config: GraspConfig,
    tokens: int,
    *,
    dtype: torch.dtype,
    ranks: Mapping[str, int] | None = None,
    extra: int = 0,
    fetched: bool = False,
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
        fetched: whether weights are offloaded or sharded.
    """
    layers = range(min(target.layer for target in targets), len(decoder(tracer.model).layers))
    form = form_in_sweeps(config)
    projected = projected_outputs(targets, config)
    needs = needs_of(tracer, targets, layers, ranks, form=form, dtype=dtype, projected=projected)
    if ranks is None and config.schedule == "progressive":
        most = {target.name: break_even_rank(dense_shape(target.module), config.form) for target in targets}
        low = needs_of(tracer, targets, layers, most, form=form, dtype=dtype, projected=projected)
        needs = {layer: LayerNeeds(*map(max, needs[layer], low[layer])) for layer in layers}
    return SpanMemory(
        targets=targets,
        layers=layers,
        needs=needs,
        fixed=fixed_bytes(tracer, dtype) + code_bytes(tracer, targets, ranks) + extra,
        head=head_bytes(tracer),
        sum_bytes=lambda part: statistics_bytes(part, config, tokens, fetched=fetched),
        decomposition_bytes=lambda target: temporary_bytes(target, config),
        other=max(
            forward_bytes(tracer, range(layers.start), dtype),
            replacing_bytes(tracer, targets, config),
            quantizing_bytes(tracer) if config.bits is not None else 0,
        ),
    )


def form_in_sweeps(config: GraspConfig) -> Form:
    """The form of low-rank linears while others are swept; those that are to be fitted are factored."""
    return "factored" if config.refit and not config.decides_together else config.form


def forward_bytes(tracer: Tracer, layers: range, dtype: torch.dtype) -> int:
    """One batch that passes the model without a graph, and the copies of some layers in the dtype of the sweeps."""
    modules = decoder(tracer.model).layers
    passing = max(_passing_bytes(tracer, layer) for layer in range(len(modules)))
    return passing + sum(copy_bytes(tracer, modules[layer], dtype) for layer in layers)


def _passing_bytes(tracer: Tracer, layer: int) -> int:
    """One batch that passes a layer without a graph."""
    cost = tracer.layer(layer, "none")
    return states_bytes(tracer) + FRAGMENTATION * (cost.saved + cost.transient)


def copy_bytes(tracer: Tracer, module: nn.Module, dtype: torch.dtype) -> int:
    """A copy of a module in the dtype of the sweeps, in bytes; 0 if its weights have that dtype."""
    if dtype == tracer.model.dtype:
        return 0
    return tracer.model.dtype.itemsize * sum(parameter.numel() for parameter in module.parameters())


def replacing_bytes(tracer: Tracer, targets: Collection[Target], config: GraspConfig) -> int:
    """The replacement of the linears of one layer: all their factors, and one that is read and cut, or fitted.

    A fit has two sums of an input, products for each linear that may share it, and one batch that passes the layer, or
    the solution. Pivoting works in fp64.
    """
    factors: Counter[int] = Counter()  # of each layer
    products: Counter[tuple[int, int]] = Counter()  # of the linears of each layer and width
    for target in targets:
        (n, k), rank = dense_shape(target.module), break_even_rank(dense_shape(target.module), config.form)
        factors[target.layer] += target.module.weight.itemsize * rank * (n + k)
        products[target.layer, k] += products_bytes((n, k), rank, item_bytes(target))
    most = 0
    for target in targets:
        (n, k), itemsize = dense_shape(target.module), item_bytes(target)
        rank = break_even_rank((n, k), config.form)
        taken = READ_COPIES * itemsize * rank * (n + k)
        if config.refit:
            solving = least_squares_bytes((n, k), rank, itemsize)
            sums = 2 * itemsize * k * k + products[target.layer, k]
            taken = max(taken, sums + max(_passing_bytes(tracer, target.layer), solving))
        if config.form == "pivoted":
            taken = max(taken, pivot_bytes((n, k), rank))
        most = max(most, factors[target.layer] + taken)
    return most


def quantizing_bytes(tracer: Tracer) -> int:
    """The quantisation of one layer: two sums of an input, and one batch, or one linear that is rounded."""
    most = 0
    for layer, targets in eligible_targets(tracer.model)[0].items():
        passing = _passing_bytes(tracer, layer)
        for target in targets:
            n, k = dense_shape(target.module)
            most = max(most, 2 * 4 * k * k + max(passing, rounding_bytes((n, k))))
    return most


def statistics_bytes(targets: Collection[Target], config: GraspConfig, tokens: int, *, fetched: bool = False) -> int:
    """The sums of one sweep: covariances, or the gradient of each weight, and decompositions with their gradients."""
    basis, moment = BASES[config.basis], METRICS[config.metric].moment
    shapes = [(item_bytes(target), *dense_shape(target.module)) for target in targets]
    groups = sum(itemsize * min(n, k) * (n + k + 2) for itemsize, n, k in shapes)
    if basis.inputs:
        projected = projected_outputs(targets, config)
        covariances = covariance_bytes(targets, outputs=basis.outputs, projected=projected, fetched=fetched)
        return covariances if moment == "none" else covariances + groups
    if moment != "first":
        return groups if moment == "second" else 0
    return sum(
        itemsize * (n * k if dense_is_cheaper((n, k), tokens) else min(n, k) * (n + k + 2)) for itemsize, n, k in shapes
    )


def projected_outputs(targets: Iterable[Target], config: GraspConfig) -> frozenset[Target]:
    """The targets whose output covariances are summed as ``Projected``: where that is cheaper, and suffices.

    All of the covariance is read where the loss of fewer bits is predicted, and where channels before a linear may go.
    """
    if config.fewest_bits is not None or not BASES[config.basis].outputs:
        return frozenset()
    suffices = (target for target in targets if not (config.narrows and is_down(target)))
    return frozenset(target for target in suffices if is_projected_cheaper(dense_shape(target.module)))


def temporary_bytes(target: Target, config: GraspConfig) -> int:
    """The temporaries and the result of one decomposition, with which the loss of fewer bits may be predicted."""
    basis, shape = BASES[config.basis], dense_shape(target.module)
    groups = retained_groups(config, shape)
    itemsize = item_bytes(target)
    needed = decomposition_bytes(
        shape,
        inputs=basis.inputs,
        outputs=basis.outputs,
        projected=target in projected_outputs([target], config),
        rank=groups,
        itemsize=itemsize,
    )
    if config.narrows and is_down(target) and groups is not None:
        needed = max(needed, itemsize * groups * sum(shape) + narrow_bytes(shape, target.module.weight.itemsize))
    if config.fewest_bits is None or groups is None:
        return needed
    return max(needed, itemsize * groups * sum(shape) + rounding_bytes(shape))


def is_down(target: Target) -> bool:
    """Whether channels of an MLP may be removed before a linear; its name suffices for an estimate."""
    return target.name.endswith(f".{DOWN}")


def retained_groups(config: GraspConfig, shape: Shape) -> int | None:
    """How many groups a decomposition returns: by ``magnitude`` the first ones are retained, else all (``None``)."""
    if config.threshold_ratio is not None or METRICS[config.metric].moment != "none" or not BASES[config.basis].inputs:
        return None
    return max(1, break_even_rank(shape, config.form))


def needs_of(
    tracer: Tracer,
    targets: Collection[Target],
    layers: range,
    ranks: Mapping[str, int] | None = None,
    *,
    form: Form = "factored",
    dtype: torch.dtype | None = None,
    projected: Collection[Target] = (),
) -> dict[int, LayerNeeds]:
    """What each layer takes while one batch passes and its linears are visited; layers of equal structure run once.

    Args:
        tracer: the model without data, for the batch and the dtype of the sweeps.
        targets: the linears to visit, of the tracer's model or of one with the same names.
        layers: the layers that run, from the lowest with a target.
        ranks: ranks of the low-rank linears that stand in for dense ones, by name. Their factors are counted.
        form: of these.
        dtype: of the weights, if it is another than that of the sweeps: a copy of the layer is counted.
        projected: the linears whose output covariances are projected.
    """
    known = dict(tracer.model.named_modules())  # a loaded model may have been changed
    standing_in = {name: rank for name, rank in (ranks or {}).items() if name in known}
    by_layer: defaultdict[int, list[Target]] = defaultdict(list)
    for target in targets:
        if target.name in known:
            by_layer[target.layer].append(target)
    path, modules = decoder(tracer.model).path, decoder(tracer.model).layers
    needs: dict[int, LayerNeeds] = {}
    for layer in layers:
        visited = by_layer[layer]
        low = {name: rank for name, rank in standing_in.items() if name.startswith(f"{path}.{layer}.")}
        graph: Graph = "starts" if layer == layers.start else "enters"
        cost = tracer.layer(layer, graph, visited=visited, ranks=low, form=form)
        stored = sum(parameters_at(dense_shape(known[name]), rank, form) for name, rank in low.items())
        factors = tracer.model.dtype.itemsize * stored
        copied = 0 if dtype is None else copy_bytes(tracer, modules[layer], dtype)
        visiting = max((visit_bytes(tracer, target, target in projected) for target in visited), default=0)
        temporaries = cost.transient + visiting + states_bytes(tracer)
        needs[layer] = LayerNeeds(cost.saved + factors + copied, FRAGMENTATION * temporaries)
    return needs


def states_bytes(tracer: Tracer) -> int:
    """The hidden states of one batch, in bytes."""
    return tracer.batch.input_ids.numel() * tracer.width * tracer.model.dtype.itemsize


def visit_bytes(tracer: Tracer, target: Target, projected: bool) -> int:
    """Temporary bytes of adding one call to a sum: the tokens of 16-bit sweeps are converted to fp32, or projected."""
    (n, k), tokens = dense_shape(target.module), tracer.batch.input_ids.numel()
    converted = 0 if tracer.model.dtype.itemsize >= 4 else 4 * tokens
    projecting = item_bytes(target) * (tokens * k + panel(tracer.batch.input_ids.device) * n) if projected else 0
    return converted * n + max(converted * k, projecting)


def head_bytes(tracer: Tracer) -> int:
    """The loss of one batch: a slice of logits in fp32 with its gradient, and hidden states and gradients beside it."""
    vocabulary = vocabulary_size(tracer.model)
    rows = min(slice_rows(vocabulary), tracer.batch.input_ids.numel())
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
    capacity = os.environ.get(CODE_SHAPES, "1024")
    if not capacity.isdecimal():
        raise ValueError(f"the environment variable {CODE_SHAPES} must be a whole number of shapes, got {capacity!r}")
    return CODE_BYTES * min(int(capacity), 4 * len(shapes))
