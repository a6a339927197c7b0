"""The losses on batches that nothing was fitted to: before, after, and with layers removed instead."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress

from grasp.checkpoint.compression_report import COMPRESSED, DENSE
from grasp.compression.budget import Plan, required_saving
from grasp.compression.run import Run
from grasp.errors import UnsupportedModelError
from grasp.formatting import layer_ranges
from grasp.method.ranks import redundant_layers
from grasp.model.layer_removal import require_removable
from grasp.statistics.layer_losses import losses_without


def losses_before(run: Run, plan: Plan, scores: Sequence[float]) -> dict[str, float]:
    """The losses of the dense model and, if the budget can be met so, of the model without whole layers.

    Args:
        run: the run; none of its linears is replaced yet.
        plan: what is to be saved.
        scores: the block influence of each layer.
    """
    if not run.unseen:
        return {}
    choices = {DENSE: (), **_removed_instead(run, plan, scores)}
    losses = losses_without(run.model, list(choices.values()), run.unseen, processes=run.processes)
    return dict(zip(choices, losses, strict=True))


def losses_after(run: Run) -> dict[str, float]:
    """The loss of the compressed model."""
    if not run.unseen:
        return {}
    return {COMPRESSED: losses_without(run.model, [()], run.unseen, processes=run.processes)[0]}


def _removed_instead(run: Run, plan: Plan, scores: Sequence[float]) -> dict[str, tuple[int, ...]]:
    """The fewest layers of least block influence whose removal meets the budget, by their name; or nothing."""
    saving, saved = required_saving(run.prices, plan), 0.0
    order = redundant_layers(scores, len(scores) - 1)
    for count, layer in enumerate(order, start=1):
        saved += run.prices.layer(layer)
        if saved >= saving > 0:
            removed = tuple(sorted(order[:count]))
            with suppress(UnsupportedModelError):
                require_removable(run.model, removed)
                return {f"layers {layer_ranges(removed)} removed": removed}
            break
    return {}
