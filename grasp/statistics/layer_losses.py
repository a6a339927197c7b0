"""The loss without some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from grasp.model.batch import CalibrationBatch
from grasp.model.layer_removal import skipping
from grasp.progress import Progress, no_progress
from grasp.statistics.loss import sum_nll
from grasp.statistics.processes import ALONE, Processes


def removal_losses(
    model: PreTrainedModel,
    layers: Sequence[int],
    batches: Sequence[CalibrationBatch],
    removed: Sequence[int] = (),
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[int, float]:
    """The loss that removing one more layer adds once some are ``removed``; the rest as ``losses_without``."""
    choices = [removed, *([*removed, layer] for layer in layers)]
    before, *after = losses_without(model, choices, batches, progress=progress, processes=processes)
    return {layer: loss - before for layer, loss in zip(layers, after, strict=True)}


@torch.no_grad()
def losses_without(
    model: PreTrainedModel,
    choices: Sequence[Sequence[int]],
    batches: Sequence[CalibrationBatch],
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> list[float]:
    """The loss without some layers, in nats per token, for each choice of layers. The model is not changed.

    Args:
        model: a decoder-only causal language model.
        choices: indices into the decoder layers; none for the model as it is.
        batches: the loss is measured on them; the same in all processes.
        progress: called after each choice.
        processes: the processes that share the batches.
    """
    local_batches = processes.local_batches(batches)
    sums = torch.zeros(len(choices), dtype=torch.float64)
    for index, removed in enumerate(choices):
        with processes.fail_together(), skipping(model, removed, batches[0]):
            sums[index] = sum_nll(model, local_batches)
        progress("candidates, without one layer", index + 1, len(choices))
    processes.sum_([sums])
    return (sums / sum(batch.num_targets for batch in batches)).tolist()
