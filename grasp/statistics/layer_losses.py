"""What the removal of each layer adds to the loss."""

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
    """What deleting each of some layers alone adds to the loss, in nats per token; the model is left as it is.

    Args:
        model: a decoder-only causal language model.
        layers: indices into the decoder layers.
        batches: what the loss is taken on, given to all processes.
        progress: called after each layer.
        processes: those that share the batches.
    """
    own = processes.local_batches(batches)
    sums = torch.zeros(len(layers) + 1, dtype=torch.float64)
    for index, removed in enumerate([[], *([layer] for layer in layers)]):
        with processes.fail_together(), skipping(model, removed, batches[0]):
            sums[index] = sum_nll(model, own)
        progress("removal of layers", index, len(layers))
    processes.sum_([sums])
    losses = ((sums[1:] - sums[0]) / sum(batch.num_targets for batch in batches)).tolist()
    return dict(zip(layers, losses, strict=True))
