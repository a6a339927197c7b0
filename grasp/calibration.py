"""Text → token batches; a sample is one sequence of ``seq_len`` tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from torch import Tensor

from grasp.errors import CalibrationError


class CalibrationBatch(NamedTuple):
    """Token ids (B, L) int64, and a bool mask (B, L) that is False at padding; ``None`` where there is none."""

    input_ids: Tensor
    attention_mask: Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens that are no padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())


def as_batches(batches: Iterable[CalibrationBatch | Tensor]) -> list[CalibrationBatch]:
    """Accept plain (B, L) token tensors beside batches.

    Raises:
        CalibrationError: if there are none, or none has a token to predict.
    """
    result = [batch if isinstance(batch, CalibrationBatch) else CalibrationBatch(batch) for batch in batches]
    if not any(batch.input_ids.shape[1] > 1 for batch in result):
        raise CalibrationError(
            f"{len(result)} calibration batches hold no token to predict; expected sequences of at least 2 tokens"
        )
    return result


def batches_digest(batches: Sequence[CalibrationBatch]) -> str:
    """SHA-256 of all token ids, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.input_ids.cpu().numpy().tobytes())
    return digest.hexdigest()
