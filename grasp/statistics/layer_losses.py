"""The loss that the removal of each layer adds."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from grasp.model.batch import CalibrationBatch
from grasp.model.layer_removal import skipping
from grasp.progress import Progress, no_progress
from grasp.statistics.loss import sum_nll
from grasp.statistics.processes import ALONE, Processes


@torch.no_grad()
def removal_losses(
    model: PreTrainedModel,
    layers: Sequence[int],
    batches: Sequence[CalibrationBatch],
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[int, float]:
    """The loss that removing each of some layers alone adds, in nats per token. The model is not changed.

    Args:
        model: a decoder-only causal language model.
        layers: indices into the decoder layers.
        batches: the loss is measured on them; the same in all processes.
        progress: called after each layer.
        processes: the processes that share the batches.
    """
    local_batches = processes.local_batches(batches)
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)
    for index, removed in enumerate([[], *([layer] for layer in layers)]):
        with processes.fail_together(), skipping(model, removed, batches[0]):
            sums[index] = sum_nll(model, local_batches)
        progress("removal of layers", index, len(layers))
    processes.sum_([sums])
    losses = ((sums[1:] - sums[0]) / sum(batch.num_targets for batch in batches)).tolist()
    return dict(zip(layers, losses, strict=True))
