"""A baseline: our own implementation of LEMS, which searches ranks by measured divergences (ICML 2026).

Each weight is decomposed in the basis of its inputs and gradients, whose covariances are shrunk strongly. Each linear
alone is cut to a tenth of its break-even rank, and the divergence from the dense model scales its predicted losses.
They are weighed by depth, with two parameters: of ten random pairs the one is taken whose compressed model diverges
least. There is one sweep and no fit. Unlike theirs, gradients are neither clipped nor cropped, and divergences are
taken at temperature 1, of fewer tokens.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.compression.eligible import eligible_targets
from grasp.files import write_whole
from grasp.method.knapsack import DENSE, Choices, Layer, allocate_layers
from grasp.method.ranks import break_even_rank, parameters_at
from grasp.method.svd import SVD, decompose_in
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_shape, dense_weight
from grasp.model.hooks import replaced
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import Target, decoder
from grasp.progress import Progress
from grasp.statistics.covariance import Covariance, gather_covariances
from grasp.statistics.divergence import sum_divergences
from grasp.statistics.sweep import Prefix, capture_prefix, propagate

INPUTS, GRADIENTS = 0.1, 0.3  # how far each covariance is shrunk to its mean eigenvalue
MEASURED = 0.1  # share of the break-even rank that is measured
LEAST, MOST, MULTIPLE = 0.3, 0.95, 8  # the ranks to choose from: shares of the break-even rank, and multiples
TRIALS = 10
SEARCHED = 4096  # calibration tokens that measure divergences, at most
MOST_EXPONENT, MOST_GAIN = 3.0, 7.0

Ranks = Mapping[Target, int]  # of the low-rank linears


def lems_(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    saving: float,
    measured: Path,
    *,
    dtype: str | None,
    progress: Progress,
) -> dict[str, int]:
    """Compress a model.

    Args:
        model: the dense model.
        batches: the calibration sequences; the first ones measure divergences too.
        saving: parameters to remove.
        measured: file of the divergence of each linear, which serves every ``saving``; made if there is none.
        dtype: the model runs in it; ``None`` for its own.
        progress: called as ``progress(step, done, total)``.

    Returns:
        The rank of each low-rank linear.
    """
    targets = [target for of_layer in eligible_targets(model)[0].values() for target in of_layer]
    prefix = capture_prefix(model, batches, {0}, dtype=dtype)
    covariances = gather_covariances(prefix, targets, progress=progress)
    svds = {target: _decomposed(target, covariances.pop(target)) for target in targets}
    prefix = replace(prefix, batches=batches[: max(1, SEARCHED // batches[0].input_ids.numel())])
    dense = propagate(prefix, _all_layers(prefix), prefix.hidden[0])
    divergences = _divergences(prefix, svds, dense, measured, progress)
    curves = {t: choices(dense_shape(t.module), svds[t].S, divergences[t.name]) for t in targets}
    budget = sum(target.module.weight.numel() for target in targets) - saving
    found: list[tuple[float, Ranks]] = []
    for exponent, gain in np.random.default_rng(0).random((TRIALS, 2)):
        weights = depth_weights(len(_all_layers(prefix)), MOST_EXPONENT * exponent, MOST_GAIN * gain)
        ranks = allocated(curves, weights, budget)
        with replaced(model, _low_rank(svds, ranks)):
            after = propagate(prefix, _all_layers(prefix), prefix.hidden[0])
        found.append((sum_divergences(prefix, [after], dense)[0], ranks))
        progress("LEMS, compared", len(found), TRIALS)
    _, best = min(found, key=lambda trial: trial[0])
    for name, module in _low_rank(svds, best).items():
        model.set_submodule(name, module)
    return {target.name: rank for target, rank in best.items()}


def shrunk(total: Tensor, tokens: int, share: float) -> Tensor:
    """The covariance of a sum over tokens, moved by a share to its mean eigenvalue."""
    covariance = total / tokens
    return (1 - share) * covariance + share * covariance.diagonal().mean() * torch.eye(len(total), dtype=total.dtype)


def choices(shape: tuple[int, int], S: Tensor, divergence: float) -> Choices:
    """What a linear can have: the ranks with their parameters and predicted losses, or dense.

    Args:
        shape: (N, K) of the weight.
        S: its singular values, in descending order.
        divergence: measured at the share ``MEASURED`` of the break-even rank.
    """
    whole = break_even_rank(shape, "factored")
    kept = S.double().square().cumsum(0)
    dropped = 1 - kept / kept[-1]  # at rank 1, 2, ...
    scale = divergence / max(float(dropped[_measured_rank(shape) - 1]), 1e-6)
    ranks = [rank for rank in range(MULTIPLE, whole, MULTIPLE) if LEAST <= rank / whole <= MOST]
    return Choices(
        (*ranks, DENSE),
        (*(parameters_at(shape, rank, "factored") for rank in ranks), shape[0] * shape[1]),
        (*(scale * float(dropped[rank - 1]) for rank in ranks), 0.0),
    )


def depth_weights(depth: int, exponent: float, gain: float) -> list[float]:
    """What the losses of each layer are multiplied by: ``1 + gain`` in the first layer, falling to 1 in the last.

    It falls as the sum of ``(layer + 1) ** -exponent`` over this layer and all after it.
    """
    rest = np.cumsum(np.arange(1, depth + 1.0)[::-1] ** -exponent)[::-1]
    span = max(rest[0] - rest[-1], 1e-12)
    return [float(weight) for weight in 1 + gain * (rest - rest[-1]) / span]


def allocated(curves: Mapping[Target, Choices], weights: Sequence[float], budget: float) -> Ranks:
    """The ranks with the least predicted loss in a budget of parameters; linears that stay dense are left out."""
    weighed = [
        curve._replace(losses=tuple(loss * weights[target.layer] for loss in curve.losses))
        for target, curve in curves.items()
    ]
    (picked,) = allocate_layers([Layer(weighed)], budget)
    assert picked is not None  # a layer without a loss of removal stays
    chosen = {target: curve.ranks[at] for (target, curve), at in zip(curves.items(), picked, strict=True)}
    return {target: rank for target, rank in chosen.items() if rank != DENSE}


def _divergences(
    prefix: Prefix, svds: Mapping[Target, SVD], dense: Sequence[Tensor], file: Path, progress: Progress
) -> dict[str, float]:
    """The divergence from the dense model if only one linear has low rank, by its name; known ones are in the file."""
    known: dict[str, float] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    entering, hidden, depth = 0, prefix.hidden[0], _all_layers(prefix).stop
    missing = [target for target in svds if target.name not in known]
    for layer, targets in groupby(missing, key=lambda target: target.layer):
        hidden, entering = propagate(prefix, range(entering, layer), hidden) if layer else hidden, layer
        names, students = [], []
        for target in targets:
            with replaced(prefix.model, _low_rank(svds, {target: _measured_rank(dense_shape(target.module))})):
                students.append(propagate(prefix, range(layer, depth), hidden))
            names.append(target.name)
        known |= zip(names, sum_divergences(prefix, students, dense), strict=True)
        write_whole(file, json.dumps(known))
        progress("LEMS, one linear", len(known), len(svds))
    return known


def _low_rank(svds: Mapping[Target, SVD], ranks: Ranks) -> dict[str, LowRankLinear]:
    """The linears of these ranks, by path."""
    return {t.name: LowRankLinear.from_dense(t.module, torch.arange(rank), svds[t]) for t, rank in ranks.items()}


def _decomposed(target: Target, covariance: Covariance) -> SVD:
    """The groups up to the break-even rank."""
    A, B, tokens = covariance
    assert isinstance(B, Tensor)  # as gathered
    weight, rank = dense_weight(target.module), break_even_rank(dense_shape(target.module), "factored")
    return decompose_in(weight, shrunk(A, tokens, INPUTS), shrunk(B, tokens, GRADIENTS), target.name, rank)


def _measured_rank(shape: tuple[int, int]) -> int:
    return max(1, int(MEASURED * break_even_rank(shape, "factored")))


def _all_layers(prefix: Prefix) -> range:
    return range(len(decoder(prefix.model).layers))
