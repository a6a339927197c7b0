"""The budget: in which unit it is counted, how much is to be saved, and which linears share it. Pure functions.

A new unit is one row of ``UNITS``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

from transformers import PreTrainedModel

from grasp.compression.quantize import DENSE_FROM, bytes_saved
from grasp.config import GraspConfig
from grasp.method.cost_table import CostTable
from grasp.method.knapsack import DENSE, ROUNDED
from grasp.method.ranks import (
    Budget,
    Form,
    Shape,
    break_even_rank,
    factor_shapes,
    parameters_at,
    parameters_removed,
    rank_for_retain_ratio,
    redundant_layers,
    solve_compression_ratio,
    uniform_budget,
)
from grasp.method.storage import Storage, matrix_bytes
from grasp.model.dense import dense_shape
from grasp.model.layer_removal import can_remove
from grasp.model.narrowing import narrowest_shapes
from grasp.model.size import model_size
from grasp.model.targets import Target, decoder
from grasp_kernels.packing import RANK_MULTIPLE

ORDER_ITEMSIZE = 4
Targets = Mapping[int, Sequence[Target]]  # layer → the linears that can be compressed


@dataclass(frozen=True)
class Prices:
    """The unit of a budget, and how much of it is to be saved."""

    linear: Callable[[Target, int], float]  # the cost of a linear at a rank, or ``DENSE``
    layer: Callable[[int], float]  # the cost of a whole decoder layer as it is
    saving: float | None = None  # of the whole model; ``None``: as much as the uniform ranks of the plan save
    multiple: int = 1  # ranks to consider: kernels pad ranks to a multiple, so ranks in between save no time or bytes
    target: Callable[[float], str] = "{}".format  # the target that a saving reaches, for messages
    capped: bool = False  # whether as much as ranks can save will do, if that is less than ``saving``

    def saved(self, target: Target, rank: int) -> float:
        """The cost that a rank saves of a linear; negative if the linear is cheaper dense."""
        return self.linear(target, DENSE) - self.linear(target, rank)


class Plan(NamedTuple):
    """Which linears may be compressed. The uniform ranks say how many parameters they may keep together."""

    retain_ratio: float
    layers: tuple[int, ...]  # ascending
    ranks: dict[Target, int]
    bits_suffice: bool = False  # fewer bits for all linears would save enough


def find_prices(
    config: GraspConfig,
    model: PreTrainedModel,
    targets: Targets,
    costs: CostTable | None = None,
    *,
    may_remove: bool = False,
) -> Prices:
    """The prices in the unit of a configuration's target: seconds of decoding, bytes, or parameters.

    With ``may_remove`` layers can be removed to reach the target.

    Raises:
        ValueError: if a latency is asked for without ``costs``, or no ranks reach the target.
        CostTableError: if ``costs`` were measured for another model.
    """
    if costs is not None:
        dtype = str(model.dtype).removeprefix("torch.")
        shapes = {dense_shape(target.module) for target in chain.from_iterable(targets.values())}
        shapes.update(narrowest_shapes(model) if config.narrows else ())
        costs.require(shapes, dtype, config.form, config.storages)
    prices = unit_prices(config, model, targets, costs)
    if prices.saving is not None:
        _require_reachable(config, prices, model, targets, may_remove)
    return prices


def _parameter_prices(config: GraspConfig, model: PreTrainedModel, targets: Targets, costs: CostTable | None) -> Prices:
    numbers = [sum(p.numel() for p in layer.parameters()) for layer in decoder(model).layers]
    return Prices(partial(parameters, form=config.form), numbers.__getitem__)


def _byte_prices(config: GraspConfig, model: PreTrainedModel, targets: Targets, costs: CostTable | None) -> Prices:
    assert config.target_bytes is not None
    size, weights = _dense_bytes(config, model)
    return Prices(
        *(partial(stored_bytes, config=config), weights.__getitem__, max(0, size - config.target_bytes), RANK_MULTIPLE),
        target=lambda saved: f"target_bytes={size - saved:.0f}",
    )


def _dense_bytes(config: GraspConfig, model: PreTrainedModel) -> tuple[int, list[int]]:
    """The bytes of the model, and of each layer, if all linears stay dense."""
    layers = decoder(model).layers
    size = model_size(model).bytes
    weights = [sum(p.nbytes for p in layer.parameters()) for layer in layers]
    if config.dense_storage is None:
        return size, weights
    saved, saved_by_layer = bytes_saved(model, config.dense_storage, config.embedding_storage or config.dense_storage)
    return size - saved, [before - less for before, less in zip(weights, saved_by_layer, strict=True)]


def _second_prices(config: GraspConfig, model: PreTrainedModel, targets: Targets, costs: CostTable | None) -> Prices:
    assert config.target_latency is not None
    if costs is None:
        raise ValueError(
            "target_latency needs costs: give compress_ a grasp.method.cost_table.CostTable, such as "
            f"grasp.bench.costs.measure_costs(model, form={config.form!r}, storages=config.storages)"
        )
    table = costs
    dense, start = dense_seconds(table, targets), predicted_seconds(config, table, targets, {}, ())
    beside, _ = table.beside_linears(quantized=config.storage is not None)

    def linear(target: Target, rank: int) -> float:
        return table.linear(*_kind(target, rank, config))

    def layer(index: int) -> float:
        return beside + math.fsum(linear(target, DENSE) for target in targets[index])

    return Prices(
        *(linear, layer, max(0.0, start - config.target_latency * dense), RANK_MULTIPLE),
        target=lambda saved: f"target_latency={(start - saved) / dense:.3f}",
    )


_Unit = Callable[[GraspConfig, PreTrainedModel, Targets, CostTable | None], Prices]
# The configuration's field that states a target → its prices. The first field that is set decides.
UNITS: dict[str, _Unit] = {
    "target_latency": _second_prices,
    "target_bytes": _byte_prices,
    "compression_ratio": _parameter_prices,
}
DEFAULT_UNIT = "compression_ratio"


def unit_prices(config: GraspConfig, model: PreTrainedModel, targets: Targets, costs: CostTable | None) -> Prices:
    """``find_prices`` without its checks."""
    unit = next(unit for field, unit in UNITS.items() if getattr(config, field) is not None or field == DEFAULT_UNIT)
    return unit(config, model, targets, costs)


def parameters(target: Target, rank: int, form: Form) -> int:
    """The parameters of a linear at a rank, or ``DENSE``; without the bias, which stays."""
    shape = dense_shape(target.module)
    return math.prod(shape) if rank == DENSE else parameters_at(shape, rank, form)


def stored_bytes(target: Target, rank: int, config: GraspConfig) -> int:
    """The bytes of a linear at a rank, ``DENSE`` or ``ROUNDED``, in the checkpoint; without the bias, which stays."""
    shape, low_rank, storage = _kind(target, rank, config)
    matrices = (shape,) if low_rank is None else factor_shapes(shape, low_rank, config.form)
    return matrix_bytes(matrices, storage, target.module.weight.element_size()) + order_bytes(target, rank, config.form)


def order_bytes(target: Target, rank: int, form: Form) -> int:
    """The bytes of the buffer ``order`` of a linear at a rank, ``DENSE`` or ``ROUNDED``."""
    return 0 if rank in (DENSE, ROUNDED) or form == "factored" else ORDER_ITEMSIZE * dense_shape(target.module)[0]


def _kind(target: Target, rank: int, config: GraspConfig) -> tuple[Shape, int | None, Storage | None]:
    """Shape, rank or ``None``, and storage of a linear at a rank, ``DENSE`` or ``ROUNDED``."""
    dense = {DENSE: config.dense_storage, ROUNDED: config.fewest_bits}
    shape = dense_shape(target.module)
    return (shape, None, dense[rank]) if rank in dense else (shape, rank, config.storage)


def _require_reachable(
    config: GraspConfig, prices: Prices, model: PreTrainedModel, targets: Targets, may_remove: bool
) -> None:
    """Raise unless the cheapest choices save enough, or removing all layers that can be removed."""
    assert prices.saving is not None
    cheapest = {1: "rank 1"} | ({} if config.fewest_bits is None else {ROUNDED: str(config.fewest_bits)})
    linears = chain.from_iterable(targets.values())
    most = math.fsum(max(0.0, *(prices.saved(target, rank) for rank in cheapest)) for target in linears)
    means = f"{' or '.join(cheapest.values())} in every eligible matrix"
    if prices.saving > most and may_remove and config.decides_together:
        removed: list[int] = []
        left = sorted(targets, key=prices.layer, reverse=True)
        while (layer := next((each for each in left if can_remove(model, [*removed, each])), None)) is not None:
            removed.append(layer)
            left.remove(layer)
        without = math.fsum(map(prices.layer, removed))
        most, means = max((most, means), (without, f"removing {len(removed)} of {len(targets)} layers"))
    if prices.saving > most:
        raise ValueError(f"{prices.target(prices.saving)} cannot be reached: {means} gives {prices.target(most)}")


def bits_suffice(config: GraspConfig, targets: Targets, prices: Prices) -> bool:
    """Whether fewer bits for all linears would save all that is to be saved of the whole model.

    Then ranks and bits are chosen by one sweep. More sweeps, other candidates and a fit gained nothing
    (docs/few-bits.md), since the few linears that become low-rank are those that lose next to nothing.
    """
    if config.fewest_bits is None or config.scope != "model" or not prices.saving:
        return False
    return math.fsum(prices.saved(target, ROUNDED) for target in chain.from_iterable(targets.values())) >= prices.saving


def choose_plan(
    config: GraspConfig, block_influence: Sequence[float], targets: Targets, total_parameters: int, prices: Prices
) -> Plan:
    """The linears that may be compressed: the ones of the redundant layers, or all with ``scope="model"``.

    If parameters are counted, the whole model saves as many as its redundant layers would.
    """
    shapes = {layer: [dense_shape(target.module) for target in linears] for layer, linears in targets.items()}
    budget = choose_budget(config, block_influence, targets, total_parameters, prices)
    if config.scope == "model":
        if prices.saving is None:
            ranks = _ranks(budget, targets).items()
            removed = sum(parameters_removed(dense_shape(t.module), rank, config.form) for t, rank in ranks)
            # At a retain ratio of 1 a layer saves next to nothing, so all of them share all but the smallest targets.
            budget = solve_compression_ratio(
                shapes, tuple(shapes), total_parameters, removed / total_parameters, 1.0, config.form
            )
        else:
            # Where nothing is to be saved no linear need be scored.
            budget = uniform_budget(shapes, tuple(shapes) if prices.saving else (), config.retain_ratio, config.form)
    suffice = bits_suffice(config, targets, prices)
    return Plan(budget.retain_ratio, tuple(sorted(budget.ranks)), _ranks(budget, targets), suffice)


def choose_budget(
    config: GraspConfig, block_influence: Sequence[float], targets: Targets, total_parameters: int, prices: Prices
) -> Budget:
    """The redundant layers, and the uniform rank of each of their matrices.

    If bytes or seconds are spent globally, the ranks are the ones of ``retain_ratio``. They only tell how many layers
    are needed.
    """
    shapes = {layer: [dense_shape(target.module) for target in linears] for layer, linears in targets.items()}
    uniform = partial(uniform_budget, shapes, retain_ratio=config.retain_ratio, form=config.form)
    if config.layers is not None:
        return uniform(config.layers)
    if config.num_layers is not None:
        return uniform(redundant_layers(block_influence, config.num_layers))

    def saved(layers: Sequence[int]) -> float:
        linears = (target for layer in layers for target in targets[layer])
        ranks = ((t, rank_for_retain_ratio(dense_shape(t.module), config.retain_ratio, config.form)) for t in linears)
        return math.fsum(prices.saved(target, rank) for target, rank in ranks)

    ratio = config.DEFAULT_COMPRESSION_RATIO if config.compression_ratio is None else config.compression_ratio
    saving = ratio * total_parameters if prices.saving is None else prices.saving
    order = redundant_layers(block_influence, len(shapes))
    prefixes = (order[:count] for count in range(len(order) + 1))
    chosen = next((layers for layers in prefixes if saved(layers) >= saving), order)
    if prices.saving is not None and config.decides_together:
        return uniform(chosen)
    if config.target_bytes is not None:
        sizes = {target.module.weight.element_size() for target in chain.from_iterable(targets.values())}
        if len(sizes) > 1:
            raise ValueError(
                f"linears have {sorted(sizes)} bytes per weight; target_bytes then needs allocation='global'"
            )
        orders = sum(order_bytes(target, 1, config.form) for layer in chosen for target in targets[layer])
        ratio = (saving + orders) / max(sizes) / total_parameters
    return solve_compression_ratio(
        *(shapes, chosen, total_parameters, ratio, config.retain_ratio, config.form),
        at_least=config.target_bytes is not None,
    )


def _ranks(budget: Budget, targets: Targets) -> dict[Target, int]:
    pairs = (zip(targets[layer], ranks, strict=True) for layer, ranks in budget.ranks.items())
    return dict(chain.from_iterable(pairs))


def ceilings(config: GraspConfig, plan: Plan) -> dict[Target, int]:
    """The largest rank that each linear of a plan can be given."""
    if config.allocation == "uniform":
        return dict(plan.ranks)
    shapes = {target: dense_shape(target.module) for target in plan.ranks}
    if config.storage is not None and config.storage.bits == 4:  # ``quantize_`` stores those above as dense weights
        return {target: rank_for_retain_ratio(shape, DENSE_FROM, config.form) for target, shape in shapes.items()}
    return {target: break_even_rank(shape, config.form) for target, shape in shapes.items()}


def narrowed_plan(plan: Plan, targets: Targets) -> Plan:
    """The plan for the linears of a narrowed model, which have the names of those of the whole one."""
    named = {target.name: target for target in chain.from_iterable(targets.values())}
    ranks = {named[target.name]: rank for target, rank in plan.ranks.items() if target.name in named}
    return plan._replace(ranks=ranks)


def required_saving(prices: Prices, plan: Plan) -> float:
    """What is to be saved: what the target says, or what the uniform ranks of the plan save."""
    if prices.saving is not None:
        return prices.saving
    return math.fsum(prices.saved(target, rank) for target, rank in plan.ranks.items())


def predicted_bytes(
    config: GraspConfig, model: PreTrainedModel, targets: Targets, ranks: Mapping[str, int], removed: Sequence[int]
) -> int:
    """The bytes of all weights after compression; ``model`` is dense, other arguments as ``predicted_seconds``."""
    size, weights = _dense_bytes(config, model)
    changed = (target for target in chain.from_iterable(targets.values()) if target.name in ranks)
    saved = (stored_bytes(t, DENSE, config) - stored_bytes(t, ranks[t.name], config) for t in changed)
    return size - sum(weights[layer] for layer in removed) - sum(saved)


def predicted_seconds(
    config: GraspConfig, costs: CostTable, targets: Targets, ranks: Mapping[str, int], removed: Sequence[int]
) -> float:
    """The predicted time to decode a token after compression.

    Args:
        config: of the compression; it has the bits.
        costs: of the model.
        targets: the linears that could be compressed.
        ranks: the path of each compressed linear → its rank, or ``ROUNDED``.
        removed: layers that were removed.
    """
    remaining = (target for layer, linears in targets.items() if layer not in removed for target in linears)
    after = (_kind(target, ranks.get(target.name, DENSE), config) for target in remaining)
    return costs.predict(after, len(targets) - len(removed), quantized=config.storage is not None)


def dense_seconds(costs: CostTable, targets: Targets) -> float:
    """The predicted time to decode a token with the floating model, none of whose linears is low-rank."""
    linears = ((dense_shape(target.module), None) for target in chain.from_iterable(targets.values()))
    return costs.predict(linears, len(targets))
