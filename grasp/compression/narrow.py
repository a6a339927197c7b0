"""The first cut of a progressive schedule: channels of MLPs, where they with low ranks lose less than ranks alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from grasp.checkpoint.run_state import Decision
from grasp.compression.budget import Plan, Prices, ceilings, narrowed_plan, required_saving, unit_prices
from grasp.compression.candidates import REMOVAL_LOSS_SCALES, rank_choices_of
from grasp.compression.eligible import eligible_targets
from grasp.compression.held_out import measure_whole, removal_losses
from grasp.compression.rounds import Work
from grasp.compression.run import Run
from grasp.compression.selection import Selection, Selections
from grasp.compression.spans import select
from grasp.method.channels import narrow, widths_of
from grasp.method.knapsack import DENSE
from grasp.method.metrics import nats_per_score
from grasp.method.ranks import Shape
from grasp.method.schedules import plan_sweeps
from grasp.model.narrowing import (
    DOWN,
    GATE_UP,
    can_narrow,
    empty_linear,
    mark_narrowed,
    mlp_weights,
    narrow_mlp_,
    resize_mlp_,
)
from grasp.model.targets import Target
from grasp.statistics.covariance import Covariance

LEAST_GAIN = 0.02  # of the predicted loss: with less, low ranks are the first cut


@dataclass(frozen=True)
class Mlp:
    """A gated MLP that can be narrowed: its path from the model, and its linears."""

    path: str
    gate_up: tuple[Target, Target]
    down: Target

    @property
    def channels(self) -> int:
        """Channels."""
        return self.down.module.weight.shape[1]

    @property
    def widths(self) -> list[int]:
        """Numbers of channels to consider, without all."""
        return widths_of(self.channels)


@dataclass(frozen=True)
class Choice:
    """An MLP at a width, or a linear: what each linear costs and is predicted to lose at each rank."""

    mlp: Mlp | None
    width: int
    loss: float  # of the channels
    costs: Sequence[np.ndarray]
    losses: Sequence[np.ndarray]

    def at(self, rate: float) -> tuple[float, float]:
        """Cost and loss if each unit of cost is worth ``rate``."""
        picked = [int(np.argmin(loss + rate * cost)) for cost, loss in zip(self.costs, self.losses, strict=True)]
        cost = math.fsum(float(costs[i]) for costs, i in zip(self.costs, picked, strict=True))
        return cost, self.loss + math.fsum(float(losses[i]) for losses, i in zip(self.losses, picked, strict=True))

    def value(self, rate: float) -> float:
        """What the loss and the cost are worth together."""
        cost, loss = self.at(rate)
        return loss + rate * cost


class LayerChoices(NamedTuple):
    """A decoder layer: what it costs beside its linears, their choices, and the loss without it."""

    rest: float
    parts: Sequence[Sequence[Choice]]  # one choice for a linear, and one for each width of an MLP
    removal: float

    def at(self, rate: float) -> tuple[float, float]:
        """Cost and loss if each unit of cost is worth ``rate``."""
        picked = [min(choices, key=lambda choice: choice.value(rate)).at(rate) for choices in self.parts]
        cost = self.rest + math.fsum(cost for cost, _ in picked)
        loss = math.fsum(loss for _, loss in picked)
        return (0.0, self.removal) if self.removal < loss + rate * cost else (cost, loss)

    def picked(self, rate: float) -> LayerChoices:
        """The layer with the width of each MLP that is then best."""
        return self._replace(parts=[[min(choices, key=lambda choice: choice.value(rate))] for choices in self.parts])


def narrow_(run: Run, plan: Plan, work: Work, scores: Sequence[float]) -> tuple[Run, Plan, Work]:
    """Remove channels of MLPs, and plan the rest of the budget for the smaller model; or change nothing.

    The first sweep decides. What the dense model loses without layers is measured before, on held-out batches.
    """
    config, state = run.config, run.state
    if not config.narrows:
        return run, plan, work
    if state.widths is None and work.sweeps:
        _choose_(run, plan, work)
    if not state.widths:
        return run, plan, work
    run.clock.enter("candidates")
    measure_whole(run, plan, scores)
    for path in state.widths:
        tensors, _ = state.read(state.files[f"narrow-{path}"], "channels", "weight")
        narrow_mlp_(run.model.get_submodule(path), tensors["channels"], tensors["weight"])
    targets, left = eligible_targets(run.model)
    prices, saving = unit_prices(config, run.model, targets, run.costs), required_saving(run.prices, plan)
    saving -= math.fsum(run.prices.layer(layer) - prices.layer(layer) for layer in targets)
    prices = replace(prices, saving=max(0.0, saving), capped=run.prices.saving is None)
    run = replace(run, targets=targets, left=left, prices=prices, narrowed=True)
    plan = narrowed_plan(plan, targets)
    sweeps = [] if not work.sweeps else plan_sweeps(ceilings(config, plan), config.schedule)
    return run, plan, work._replace(sweeps=sweeps)


def widen_(run: Run) -> Run:
    """Give the MLPs all their channels back, where the dense model without layers loses less."""
    for path in run.state.widths or ():
        tensors, _ = run.state.read(run.state.files[f"narrow-{path}"], *GATE_UP, DOWN)
        resize_mlp_(run.model.get_submodule(path), tensors)
        mark_narrowed(run.model.get_submodule(path), False)
    targets, left = eligible_targets(run.model)
    return replace(run, targets=targets, left=left, narrowed=False)


def remaining_channels(run: Run, decision: Decision) -> dict[str, tuple[int, int]]:
    """How many channels each narrowed MLP had and has, by path, without the MLPs of removed layers."""
    if decision.whole:
        return {}
    layer_of = {target.name: target.layer for linears in run.targets.values() for target in linears}
    widths = {path: (before, after) for path, (before, after) in (run.state.widths or {}).items()}
    return {path: pair for path, pair in widths.items() if layer_of[f"{path}.{DOWN}"] not in decision.removed}


def _choose_(run: Run, plan: Plan, work: Work) -> None:
    """Choose the widths by the first sweep, and store them with what the MLPs become."""
    (members,) = work.sweeps
    found = mlps(members, run)
    of = {target: mlp for mlp in found for target in (*mlp.gate_up, mlp.down)}

    def extra(target: Target, weight: Tensor, covariance: Covariance) -> dict[str, Tensor]:
        return channel_tensors(of[target], target, weight, covariance) if target in of else {}

    selections = select(run, plan, work.prefix, members, "first", extra=extra)
    removal: dict[int, float] = {}
    if found and run.config.target_latency is not None:  # layers take time beside their linears
        run.clock.enter("candidates")
        tokens = sum(batch.num_tokens for batch in run.batches)
        scale = REMOVAL_LOSS_SCALES[0] / nats_per_score(run.config.metric, tokens)
        removal = {layer: scale * loss for layer, loss in removal_losses(run, plan).items()}
    widths = choose_widths(run, plan, selections, found, removal)
    down = {mlp.path: selections[mlp.down].file for mlp in found}

    def whole(path: str) -> dict[str, Tensor]:  # ``widen_`` may need them
        return mlp_weights(run.model.get_submodule(path), *GATE_UP, DOWN) if run.held_out else {}

    def write(path: str, weights: dict[str, Tensor]) -> str:
        names = {name: f"{name}.{widths[path][1]}" for name in ("channels", "weight")}
        tensors, _ = run.state.read(down[path], *names.values())
        kept = {name: tensors[key] for name, key in names.items()}
        return run.state.write(f"narrow-{path}", kept | weights)

    files: dict[str, str | None] = {f"first-{target.name}": None for target in members} if widths else {}
    files |= {f"narrow-{path}": name for path, name in run.processes.map_divided(list(widths), write, fetch=whole)}
    run.processes.wait_for_all()  # they may still read the files that are removed
    run.state.record(files, widths=widths)


def mlps(members: Sequence[Target], run: Run) -> list[Mlp]:
    """The MLPs that can be narrowed, and were not before, all of whose linears are among ``members``."""
    by_name = {target.name: target for target in members}
    found = []
    for path, module in run.model.named_modules():
        names = [f"{path}.{name}" for name in (*GATE_UP, DOWN)]
        if can_narrow(module) and by_name.keys() >= {*names}:
            gate, up, down = (by_name[name] for name in names)
            found.append(Mlp(path, (gate, up), down))
    return [mlp for mlp in found if mlp.widths]


def channel_tensors(mlp: Mlp, target: Target, weight: Tensor, covariance: Covariance) -> dict[str, Tensor]:
    """What the file of a linear in an MLP has for the choice of the width.

    Of ``down_proj`` for each width the channels that stay, the weight and the loss. Of the others ``energy``, (N,): the
    score of each output, without what outputs have in common.
    """
    A, B, tokens = covariance
    assert B is not None
    if target != mlp.down:
        W = weight.to(A.dtype)
        return {"energy": ((W @ A.to(W.device)) * W).sum(1) * B.diagonal().to(W.device) / tokens**2}
    assert isinstance(B, Tensor)
    tensors: dict[str, Tensor] = {}
    for width, left in narrow(weight, A, B, mlp.widths, target.name, tokens=tokens).items():
        named = {"channels": left.channels, "weight": left.weight, "loss": torch.tensor([left.loss])}
        tensors |= {f"{name}.{width}": tensor for name, tensor in named.items()}
    return tensors


def choose_widths(
    run: Run, plan: Plan, selections: Selections, found: Sequence[Mlp], removal: Mapping[int, float]
) -> dict[str, list[int]]:
    """The channels before and after of the MLPs to narrow, by path, with which the budget is predicted to lose least.

    A narrowed linear is given the scores of the whole one, scaled by the share of the remaining channels; the next
    sweep measures them. {} if less than ``LEAST_GAIN`` is gained. Layers that are better removed keep their channels:
    ``removal`` says what that loses, in units of the scores.
    """
    linears = [target for target in selections if target in plan.ranks and not selections[target].skipped]
    usable = [mlp for mlp in found if {*mlp.gate_up, mlp.down} <= {*linears}]
    within = {target for mlp in usable for target in (*mlp.gate_up, mlp.down)}
    parts: dict[int, list[list[Choice]]] = {layer: [] for layer in plan.layers}
    for mlp in usable:
        parts[mlp.down.layer].append(_options(run, mlp, selections))
    rests = {layer: run.prices.layer(layer) for layer in plan.layers}
    budget = math.fsum(rests.values()) - required_saving(run.prices, plan)
    for target in linears:
        rests[target.layer] -= run.prices.linear(target, DENSE)
        if target not in within:
            parts[target.layer].append([_choice(run.prices, None, 0, 0.0, {target: selections[target]})])
    layers = [LayerChoices(rests[i], parts[i], removal.get(i, math.inf)) for i in plan.layers]
    rate = _rate(layers, budget)
    picked = [layer.picked(rate) for layer in layers]
    whole = [layer._replace(parts=[choices[:1] for choices in layer.parts]) for layer in layers]
    if _least_loss(picked, budget) > (1 - LEAST_GAIN) * _least_loss(whole, budget):
        return {}
    kept = (choice for layer in picked if layer.at(rate)[0] > 0 for [choice] in layer.parts)
    return {
        choice.mlp.path: [choice.mlp.channels, choice.width]
        for choice in kept
        if choice.mlp is not None and choice.width < choice.mlp.channels
    }


def _options(run: Run, mlp: Mlp, selections: Selections) -> list[Choice]:
    """An MLP at each of its widths, that of all channels first."""
    linears = (*mlp.gate_up, mlp.down)
    result = [_choice(run.prices, mlp, mlp.channels, 0.0, {target: selections[target] for target in linears})]
    down = selections[mlp.down]
    total = float(down.importance.double().sum())
    energies = [run.state.read(selections[target].file, "energy")[0]["energy"].double() for target in mlp.gate_up]
    for width in mlp.widths:
        tensors, _ = run.state.read(down.file, f"channels.{width}", f"loss.{width}")
        channels, loss = tensors[f"channels.{width}"], float(tensors[f"loss.{width}"])
        shares = [float(energy[channels].sum() / energy.sum()) for energy in energies]
        narrowed = {
            _resized(target, (width, target.module.weight.shape[1])): _scaled(selections[target], share, width)
            for target, share in zip(mlp.gate_up, shares, strict=True)
        }
        n = len(mlp.down.module.weight)
        narrowed[_resized(mlp.down, (n, width))] = _scaled(down, max(0.0, 1 - loss / total), width)
        result.append(_choice(run.prices, mlp, width, loss, narrowed))
    return result


def _resized(target: Target, shape: Shape) -> Target:
    assert isinstance(target.module, nn.Linear)
    return target._replace(module=empty_linear(target.module, shape, "meta"))


def _scaled(selection: Selection, factor: float, groups: int) -> Selection:
    """The selection of a linear with at most so many groups, whose scores are multiplied by a factor."""
    indices = selection.indices[:groups]
    return replace(selection, importance=selection.importance[:groups] * factor, indices=indices[indices < groups])


def _choice(prices: Prices, mlp: Mlp | None, width: int, loss: float, linears: Mapping[Target, Selection]) -> Choice:
    choices = [rank_choices_of(target, selection, prices) for target, selection in linears.items()]
    return Choice(mlp, width, loss, [np.asarray(c.costs) for c in choices], [np.asarray(c.losses) for c in choices])


def _rate(layers: Sequence[LayerChoices], budget: float) -> float:
    """The highest worth of a unit of cost, nearly, at which the best choices still cost more than the budget.

    Ranks, which are chosen later, save the rest.
    """
    low, high = 1e-30, 1e30
    for _ in range(100):
        rate = math.sqrt(low * high)
        cost = math.fsum(layer.at(rate)[0] for layer in layers)
        low, high = (rate, high) if cost > budget else (low, rate)
    return low


def _least_loss(layers: Sequence[LayerChoices], budget: float) -> float:
    rate = _rate(layers, budget)
    return math.fsum(layer.at(rate)[1] for layer in layers)
