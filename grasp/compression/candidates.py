"""Ways to keep to a budget, and the groups that each retains."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport, spectrum_indices
from grasp.compression.budget import Plan, Prices
from grasp.config import GraspConfig
from grasp.errors import CalibrationError
from grasp.method.knapsack import DENSE, Choices, Layer, allocate_layers, rank_choices
from grasp.method.ranks import rank_for_threshold, retained_indices
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape
from grasp.model.layer_removal import skipping
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target, replace_module_
from grasp.statistics.loss import sum_nll
from grasp.statistics.processes import Processes
from grasp.statistics.scores import Scores


def choose_groups(target: Target, scores: Scores, ranks: Mapping[Target, int], config: GraspConfig) -> Choice:
    """The singular groups of one linear that are kept, and the importance of all; nothing where it has no gradient."""
    if target not in scores:
        return {"no loss": torch.ones(())}
    svd, importance = scores[target]()
    rank = min(ranks[target], len(svd.S))
    if config.threshold_ratio is not None:
        rank = rank_for_threshold(importance, config.threshold_ratio, dense_shape(target.module))
    indices = retained_indices(importance, rank)
    kept = SVD(svd.U[:, indices], svd.S[indices], svd.Vh[indices])
    spectrum = svd.S[spectrum_indices(len(svd.S))]
    return {"indices": indices, "importance": importance, "spectrum": spectrum, **kept._asdict()}


def held_out_losses(
    model: PreTrainedModel,
    found: Sequence[tuple[Target, Choice]],
    plans: Mapping[str, Plan],
    ways: Mapping[str, Candidate],
    held_out: Sequence[CalibrationBatch],
    processes: Processes,
) -> dict[str, float]:
    """The mean loss of each candidate on the held-out batches, in nats per token; the model is left as it was."""
    own = processes.local_batches(held_out)
    sums = torch.zeros(len(ways), dtype=torch.float64)
    for index, way in enumerate(ways.values()):
        try:
            for target, choice in cut(found, plans[way.scope], way):
                _replace_(model, target, choice)
            with processes.fail_together(), skipping(model, way.removed, held_out[0]):
                sums[index] = sum_nll(model, own)
        finally:
            for target, _ in found:
                replace_module_(model, target.name, target.module)
    processes.sum_([sums])
    tokens = sum(batch.num_targets for batch in held_out)
    return dict(zip(ways, (sums / tokens).tolist(), strict=True))


def _replace_(model: PreTrainedModel, target: Target, choice: Choice) -> ModuleReport:
    """Put the low-rank form of one linear in its place."""
    for why in choice.keys() & LEFT.keys():
        return ModuleReport(target.name, target.layer, "", LEFT[why])
    kept = SVD(choice["U"], choice["S"], choice["Vh"])
    module = LowRankLinear.from_dense(target.module, torch.arange(len(kept.S)), kept)
    replace_module_(model, target.name, module)
    return _report(target, module, choice)


def _report(target: Target, module: LowRankLinear, choice: Choice) -> ModuleReport:
    indices, importance = choice["indices"], choice["importance"]
    n, k = dense_shape(target.module)
    before, after = list(target.module.parameters()), list(module.parameters())
    total = float(importance.double().sum())
    return ModuleReport(
        name=target.name,
        layer=target.layer,
        block=target.block,
        reason="",
        out_features=n,
        in_features=k,
        rank=module.rank,
        parameters_before=sum(p.numel() for p in before),
        parameters_after=sum(p.numel() for p in after),
        bytes_before=sum(p.numel() * p.element_size() for p in before),
        bytes_after=sum(p.numel() * p.element_size() for p in after),
        importance_kept=float(importance[indices].double().sum()) / total if total > 0 else 1.0,
        indices=tuple(indices.tolist()),
        spectrum=tuple(float(f"{value:.4g}") for value in choice["spectrum"].tolist()),
    )


# Of the budget's saving: how much a progressive schedule spends before it takes statistics anew. See docs/study.md.
FIRST_SHARE = 0.6
HELD_OUT = 8  # one batch in so many decides between candidates
# Of the measured loss that removing a layer adds, against the predicted one of ranks, which is often too low; at the
# last a layer goes where nothing else will do. See docs/latency.md.
SCALES = (0.5, 1.0, 2.0, 1e6)

Choice = Mapping[str, Tensor]  # indices, importance, spectrum; U, S and Vh of the groups kept; or why none: ``LEFT``
LEFT = {
    "no loss": "its output does not reach the loss",
    "dense": "stays dense: the budget does more elsewhere",
    "removed": "its layer is removed",
}


def hold_out(batches: Sequence[CalibrationBatch]) -> tuple[Sequence[CalibrationBatch], Sequence[CalibrationBatch]]:
    """The batches for the statistics, and the last eighth, at least one, to decide by."""
    if len(batches) < 2:
        raise CalibrationError(
            "scope='auto' and remove_layers hold some calibration batches out; give at least 2, or a smaller batch size"
        )
    count = max(1, len(batches) // HELD_OUT)
    return batches[:-count], batches[-count:]


class Candidate(NamedTuple):
    """One way to keep to the budget."""

    scope: str
    removed: tuple[int, ...]  # layers that go, ascending
    ranks: dict[Target, int]  # of the linears that are scored and stay; ``DENSE`` for those that stay as they are

    @property
    def name(self) -> str:
        """The scope, and the layers that go."""
        return f"{self.scope} without {', '.join(map(str, self.removed))}" if self.removed else self.scope


def candidates(
    choices: Sequence[tuple[Target, Choice]],
    plans: Mapping[str, Plan],
    config: GraspConfig,
    prices: Prices,
    removal: Mapping[int, float],
    nats: float,
) -> dict[str, Candidate]:
    """For each plan the ways to keep to its budget, by name: one, or where layers may go several.

    Losses of layers are measured, those of ranks predicted, by how much too low is not known: so the former are taken
    ``SCALES`` times. Only measuring the results can tell which is best.

    Args:
        choices: the groups of each linear that can be kept, with the importance of all.
        plans: of each scope.
        config: its ``allocation`` decides.
        prices: what is budgeted.
        removal: for each layer that may go what this adds to the loss, in nats per token.
        nats: what a score of 1 adds to the loss, per token.
    """
    found: dict[str, Candidate] = {}
    for scope, plan in plans.items():
        chosen = {target: choice for target, choice in choices if target in plan.ranks and "indices" in choice}
        if config.allocation == "uniform":
            found[scope] = Candidate(scope, (), {target: plan.ranks[target] for target in chosen})
            continue
        for scale in SCALES if removal else SCALES[:1]:
            losses = {layer: scale * loss / nats for layer, loss in removal.items()}
            candidate = _allocated(scope, chosen, plan, prices, losses)
            found.setdefault(candidate.name, candidate)
    return found


def partway(choices: Sequence[tuple[Target, Choice]], plan: Plan, prices: Prices) -> dict[Target, SVD]:
    """The groups that are kept where ``FIRST_SHARE`` of the saving is spent globally, of what does not stay dense."""
    chosen = {target: choice for target, choice in choices if target in plan.ranks and "indices" in choice}
    ranks = _allocated("", chosen, plan, prices, {}, FIRST_SHARE).ranks
    cuts = {target: _cut(chosen[target], rank) for target, rank in ranks.items() if rank != DENSE}
    return {target: SVD(kept["U"], kept["S"], kept["Vh"]) for target, kept in cuts.items()}


def _allocated(
    scope: str,
    chosen: Mapping[Target, Choice],
    plan: Plan,
    prices: Prices,
    removal: Mapping[int, float],
    share: float = 1.0,
) -> Candidate:
    """Where the budget lowers the loss most."""
    members = {layer: [target for target in chosen if target.layer == layer] for layer in plan.layers}
    dense = {layer: math.fsum(prices.linear(target, DENSE) for target in found) for layer, found in members.items()}
    layers = [
        Layer(
            [_options(target, chosen[target], prices) for target in found],
            rest=prices.layer(layer) - dense[layer],
            removal=removal.get(layer),
        )
        for layer, found in members.items()
    ]
    uniform = math.fsum(prices.saved(target, plan.ranks[target]) for target in chosen)
    saving = uniform if prices.saving is None else prices.saving
    budget = math.fsum(map(prices.layer, members)) - share * saving
    budget *= 1 + 1e-12  # seconds add up to a little more or less than the same seconds in another order
    ranks: dict[Target, int] = {}
    removed = []
    for (layer, found), kept, picked in zip(members.items(), layers, allocate_layers(layers, budget), strict=True):
        if picked is None:
            removed.append(layer)
            continue
        pairs = zip(kept.matrices, picked, strict=True)
        ranks |= {target: matrix.ranks[j] for target, (matrix, j) in zip(found, pairs, strict=True)}
    return Candidate(scope, tuple(removed), ranks)


def cut(choices: Sequence[tuple[Target, Choice]], plan: Plan, candidate: Candidate) -> Iterator[tuple[Target, Choice]]:
    """What was chosen of the linears of a plan, cut to a candidate's ranks."""
    for target, choice in choices:
        if target in candidate.ranks:
            yield target, _cut(choice, candidate.ranks[target])
        elif target.layer in candidate.removed:
            yield target, {"removed": torch.ones(())}
        elif target in plan.ranks:
            yield target, choice


def _options(target: Target, choice: Choice, prices: Prices) -> Choices:
    """What may be done to a linear: the ranks that its groups make up, or nothing."""
    costs = [prices.linear(target, rank) for rank in range(len(choice["indices"]) + 1)]
    return rank_choices(choice["importance"].tolist(), costs, prices.linear(target, DENSE), multiple=prices.multiple)


def nats_per_score(config: GraspConfig, tokens: int) -> float:
    """What a group's score of 1 predicts that dropping it adds to the loss, in nats per token.

    First order: |σ Σ ∂L/∂σ|, second: ½ σ² Σ (∂L/∂σ)², both sums over tokens; in the kfac basis ½ σ² for each token.
    """
    return {"taylor": 1 / tokens, "fisher": 0.5 / tokens, "magnitude": 0.5}.get(config.metric, math.nan)


def _cut(choice: Choice, rank: int) -> Choice:
    """Keep the most important groups of those chosen; or none, for a matrix that stays dense."""
    if rank == DENSE:
        return {"dense": torch.ones(())}
    best = retained_indices(choice["importance"][choice["indices"]], rank)
    return {
        "indices": choice["indices"][best],
        **{name: choice[name] for name in ("importance", "spectrum")},
        **{"U": choice["U"][:, best], "S": choice["S"][best], "Vh": choice["Vh"][best]},
    }
