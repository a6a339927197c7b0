"""The loss without some layers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from grasp.model.batch import CalibrationBatch
from grasp.model.targets import decoder
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import capture_prefix, propagate, sum_nll_after


@torch.no_grad()
def losses_without(
    model: PreTrainedModel,
    choices: Sequence[Sequence[int]],
    batches: Sequence[CalibrationBatch],
    *,
    processes: Processes = ALONE,
) -> list[float]:
    """The loss without some layers, in nats per token, for each choice of layers. The model is not changed.

    The layers before the first one that is left out run once for all choices: hidden states pass them, and each choice
    starts from those that enter its first layer.

    Args:
        model: a decoder-only causal language model.
        choices: indices into the decoder layers; none for the model as it is.
        batches: the loss is measured on them; the same in all processes.
        processes: the processes that share the batches.
    """
    depth, start = len(decoder(model).layers), 0
    sums = torch.zeros(len(choices), dtype=torch.float64)
    with processes.fail_together():
        prefix = capture_prefix(model, processes.local_batches(batches), {start})
    hidden = prefix.hidden[start]
    firsts = [min(removed, default=depth) for removed in choices]
    for index in sorted(range(len(choices)), key=firsts.__getitem__):
        with processes.fail_together():
            if firsts[index] > start:
                hidden = propagate(prefix, range(start, firsts[index]), hidden)
                start = firsts[index]
            rest = [layer for layer in range(start, depth) if layer not in choices[index]]
            sums[index] = sum_nll_after(prefix, hidden, rest)
    processes.sum_([sums])
    return (sums / sum(batch.num_targets for batch in batches)).tolist()
