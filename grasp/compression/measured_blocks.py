"""The losses of low-rank blocks, measured on held-out tokens: predictions are too low, not equally for each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor

from grasp.compression.budget import Plan
from grasp.compression.candidates import low_ranks
from grasp.compression.run import Run
from grasp.compression.selection import Selection, Selections, low_rank
from grasp.environment import return_freed_memory
from grasp.model.hooks import replaced
from grasp.model.targets import Target, decoder
from grasp.statistics.divergence import Reference
from grasp.statistics.sweep import propagate

_LEAST = 0.01  # of the prediction, if less is measured

Block = tuple[int, str]  # a layer, and one of ``grasp.method.schedules.BLOCKS``


def corrections(run: Run, plan: Plan, selections: Selections, reference: Reference, nats: float) -> dict[str, float]:
    """For each linear, by path, the number to multiply its scores by: one for all linears of a block of a layer.

    Each block alone is given the ranks that the whole budget would give it, and the divergence from the dense model is
    measured. The number is the root of measured over predicted, relative to all blocks: the scores then predict the
    geometric mean of both. Blocks that stay dense have none. What rounding makes diverge is added to every
    prediction, so that in bf16 small divergences correct little. ``nats`` is the loss that a score of 1 adds.
    """
    ranks = low_ranks(selections, plan, run.prices, 1.0)
    if not ranks:
        return {}
    measured, rounding = _divergences(run, reference, selections, ranks)
    predicted = dict.fromkeys(measured, rounding)
    for target, rank in ranks.items():
        scores, kept = selections[target].importance.double(), selections[target].indices[selections[target].best(rank)]
        predicted[_block(target)] += nats * float(scores.sum() - scores[kept].sum())
    factors = correction_factors(predicted, measured)
    return {target.name: factors[_block(target)] for target in selections if _block(target) in factors}


def corrected(selections: Selections, factors: Mapping[str, float]) -> Selections:
    """The selections, with the scores of each linear multiplied by its factor of ``corrections``, if it has one."""

    def scaled(selection: Selection, factor: float) -> Selection:
        return replace(selection, importance=selection.importance * factor, rounding=selection.rounding * factor)

    return {target: scaled(selection, factors.get(target.name, 1.0)) for target, selection in selections.items()}


def correction_factors(predicted: Mapping[Block, float], measured: Mapping[Block, float]) -> dict[Block, float]:
    """For each block the root of measured over predicted, relative to all blocks together.

    There are none if nothing was measured, or if a measured one is NaN or infinite.

    Example:
        >>> correction_factors({(0, "mlp"): 1.0, (1, "mlp"): 1.0}, {(0, "mlp"): 4.0, (1, "mlp"): 16.0})
        {(0, 'mlp'): 0.632..., (1, 'mlp'): 1.264...}
    """
    total = math.fsum(measured.values()) / math.fsum(predicted.values())
    if not 0 < total < math.inf:
        return {}
    shares = {block: measured[block] / (total * value) for block, value in predicted.items() if value > 0}
    return {block: math.sqrt(max(share, _LEAST)) for block, share in shares.items()}


def _divergences(
    run: Run, reference: Reference, selections: Selections, ranks: Mapping[Target, int]
) -> tuple[dict[Block, float], float]:
    """The divergence from the dense model, in nats per token: if only a block is low-rank, and what rounding makes."""
    prefix, depth = reference.prefix, len(decoder(run.model).layers)
    members = {block: list(group) for block, group in groupby(sorted(ranks, key=_block), key=_block)}
    with run.processes.fail_together():
        entering, hidden = 0, prefix.hidden[0]
        middle = propagate(prefix, range(depth // 2), hidden) if depth > 1 else hidden
        students = [propagate(prefix, range(depth // 2, depth), [*map(_rounded_otherwise, middle)])]
        for done, ((layer, _), targets) in enumerate(members.items(), start=1):
            if layer > entering:
                entering, hidden = layer, propagate(prefix, range(entering, layer), hidden)
            with replaced(run.model, {t.name: low_rank(run.state, t, selections[t], ranks[t]) for t in targets}):
                students.append(propagate(prefix, range(layer, depth), hidden))
            return_freed_memory()
            run.progress("candidates, block by block", done, len(members))
    count = len(students)
    rounding, *measured = reference.divergences(
        students, lambda done: run.progress("candidates, blocks compared", done, count)
    )
    return dict(zip(members, measured, strict=True)), rounding


def _rounded_otherwise(hidden: Tensor) -> Tensor:
    """Hidden states with other errors of rounding, the same whatever is in a batch."""
    noise = torch.rand(hidden.shape[1:], generator=torch.Generator().manual_seed(0)) - 0.5
    return (hidden + hidden * (noise * torch.finfo(hidden.dtype).eps)).to(hidden.dtype)


def _block(target: Target) -> Block:
    return target.layer, target.block
