"""The losses of a model on several kinds of text, so that a compression which ruins one of them shows it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import chain

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.calibration import builtin_kinds, token_batches
from grasp.errors import CalibrationError, MissingPackageError
from grasp.model.batch import CalibrationBatch
from grasp.model.targets import max_positions
from grasp.progress import Notify, Progress, no_progress
from grasp.statistics.loss import mean_loss
from grasp.statistics.processes import ALONE, Processes
from grasp.workflows.guards import require_known

_SEQUENCES, _TOKENS = 2, 512  # of each kind; both losses are of the same tokens, so few suffice to compare them
_CHARACTERS = 20_000  # of each kind are read: enough for 1024 tokens of any tokenizer


def batches_by_kind(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seq_len: int, notify: Notify
) -> dict[str, list[CalibrationBatch]]:
    """Token batches of each kind of built-in text, of the parts that no calibration reads; {} if they cannot be had.

    Args:
        seq_len: tokens of a sequence, at most; 512 at most are taken, and as many as the model has positions.
        notify: called with one line if their package is missing, or the tokenizer is of another model.
    """
    longest = min(_TOKENS, seq_len, max_positions(model) or _TOKENS)
    sizes = {"num_samples": _SEQUENCES, "seq_len": longest, "batch_size": _SEQUENCES}
    try:
        texts = builtin_kinds("evaluation")
        kinds = {kind: token_batches(tokenizer, text[:_CHARACTERS], **sizes) for kind, text in texts.items()}
        for batch in chain.from_iterable(kinds.values()):
            require_known(model, batch.input_ids)
    except (MissingPackageError, CalibrationError) as error:
        notify(f"losses on other kinds of text are not measured: {error}")
        return {}
    return kinds


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
        losses[kind] = mean_loss(model, batches, processes=processes)
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
