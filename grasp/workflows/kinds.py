"""The losses of a model on several kinds of text, so that a compression which ruins one of them shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.calibration import builtin_kinds, token_batches
from grasp.errors import MissingPackageError
from grasp.model.batch import CalibrationBatch
from grasp.progress import Notify, Progress, no_progress
from grasp.statistics.layer_losses import losses_without
from grasp.statistics.processes import ALONE, Processes

_SEQUENCES, _TOKENS = 2, 512  # of each kind; both losses are of the same tokens, so few suffice to compare them
_CHARACTERS = 20_000  # of each kind are read: enough for 1024 tokens of any tokenizer


def batches_by_kind(
    tokenizer: PreTrainedTokenizerBase, seq_len: int, notify: Notify
) -> dict[str, list[CalibrationBatch]]:
    """Token batches of each kind of built-in text, of the parts that no calibration reads; {} without their package.

    Args:
        tokenizer: of the model.
        seq_len: tokens of a sequence, at most; 512 at most are taken.
        notify: called with one line if the package is missing.
    """
    try:
        texts = builtin_kinds("evaluation")
    except MissingPackageError as error:
        notify(f"losses on other kinds of text are not measured: {error}")
        return {}
    sizes = {"num_samples": _SEQUENCES, "seq_len": min(_TOKENS, seq_len), "batch_size": _SEQUENCES}
    return {kind: token_batches(tokenizer, text[:_CHARACTERS], **sizes) for kind, text in texts.items()}


def losses_by_kind(
    model: PreTrainedModel,
    kinds: Mapping[str, Sequence[CalibrationBatch]],
    *,
    progress: Progress = no_progress,
    processes: Processes = ALONE,
) -> dict[str, float]:
    """The mean loss on each kind of text, in nats per token."""
    losses: dict[str, float] = {}
    for kind, batches in kinds.items():
        [losses[kind]] = losses_without(model, [()], batches, processes=processes)
        progress("kinds of text", len(losses), len(kinds))
    return losses


def finite_pairs(
    before: Mapping[str, float], after: Mapping[str, float], notify: Notify
) -> dict[str, tuple[float, float]]:
    """The losses of each kind before and after; ``notify`` names the kinds where one is NaN or infinite."""
    pairs = {kind: (before[kind], after[kind]) for kind in before}
    finite = {kind: pair for kind, pair in pairs.items() if all(map(math.isfinite, pair))}
    if broken := pairs.keys() - finite.keys():
        notify(f"the loss on {', '.join(sorted(broken))} is NaN or infinite; check the model, and its dtype")
    return finite
