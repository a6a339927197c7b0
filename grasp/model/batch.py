"""Batches of token ids for sweeps and losses."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from grasp.errors import CalibrationError

CONTEXT = 32  # docs/tried.md


class Tokens(Protocol):
    """A batch of sequences with a mask of the tokens that the loss counts."""

    @property
    def input_ids(self) -> Tensor:
        """(B, L) int64."""

    @property
    def attention_mask(self) -> Tensor | None:
        """(B, L) bool, False at padding; ``None`` if the model gets no mask."""

    @property
    def is_target(self) -> Tensor:
        """(B, L - 1) bool: whether the token after each position counts."""


class CalibrationBatch(NamedTuple):
    """Token ids (B, L) int64, and a bool mask (B, L) that is False at padding; ``None`` means no padding.

    The first ``context`` tokens of each sequence are read, but what they predict does not count.

    Example:
        >>> batch = CalibrationBatch(torch.tensor([[5, 6, 7, 0]]), torch.tensor([[True, True, True, False]]))
        >>> batch.num_tokens, batch.num_targets
        (3, 2)
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    context: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.sum())

    @property
    def num_targets(self) -> int:
        """Tokens that the model predicts, and that count."""
        return int(self.is_target.sum())

    @property
    def is_target(self) -> Tensor:
        """(B, L - 1) bool: True behind the context if neither the token at a position nor the next one is padding."""
        mask = self.attention_mask
        mask = torch.ones_like(self.input_ids, dtype=torch.bool) if mask is None else mask.bool()
        counts = mask[:, 1:] & mask[:, :-1]
        counts[:, : self.context] = False
        return counts


def as_batches(batches: Iterable[CalibrationBatch | Tensor]) -> list[CalibrationBatch]:
    """Convert (B, L) token tensors to batches, with padding behind the tokens, and check them.

    Models that are given no positions count them from the first column.

    Raises:
        CalibrationError: if a shape or dtype is wrong, or no batch has a token to predict.
    """
    result = [batch if isinstance(batch, CalibrationBatch) else CalibrationBatch(batch) for batch in batches]
    for batch in result:
        ids = batch.input_ids
        if ids.dim() != 2 or ids.dtype != torch.int64:
            raise CalibrationError(f"a batch must be (B, L) int64 token ids, got {tuple(ids.shape)} {ids.dtype}")
        if batch.attention_mask is not None and batch.attention_mask.shape != ids.shape:
            got = tuple(batch.attention_mask.shape)
            raise CalibrationError(f"attention_mask must have the shape of the ids, {tuple(ids.shape)}, got {got}")
    if not any(batch.num_targets for batch in result):
        raise CalibrationError(
            f"{len(result)} calibration batches have no token to predict; expected sequences of at least 2 tokens"
        )
    return [_right_padded(batch) for batch in result]


def _right_padded(batch: CalibrationBatch) -> CalibrationBatch:
    ids, mask, context = batch
    if mask is None:
        return batch
    order = mask.int().argsort(dim=1, descending=True, stable=True)
    return CalibrationBatch(ids.gather(1, order), mask.gather(1, order), context)


def excerpt(
    batches: Sequence[CalibrationBatch], *, sequences: int, tokens: int, parts: int = 1
) -> list[CalibrationBatch]:
    """The first tokens of some sequences that are evenly spaced over all, in batches no larger than the given ones.

    A quarter of the shortest one, but at most ``CONTEXT`` tokens, is context alone in each: with little context models
    behave otherwise than later.

    Args:
        batches: from ``as_batches``.
        sequences: so many at most.
        tokens: of all together, at most; but two of each sequence.
        parts: so many batches at least, if there are as many sequences.

    Example:
        >>> batches = [CalibrationBatch(torch.full((1, 4), number)) for number in range(6)]
        >>> [batch.input_ids.tolist() for batch in excerpt(batches, sequences=3, tokens=6)]
        [[[1, 1], [3, 3]], [[5, 5]]]
    """
    rows = [row for batch in batches for row in _sequences(batch) if len(row) > 1]
    count = min(sequences, len(rows))
    length = max(2, tokens // count)
    chosen = [rows[(2 * index + 1) * len(rows) // (2 * count)][:length] for index in range(count)]
    largest = max(batch.input_ids.numel() for batch in batches)
    together = max(1, min(largest // length, count // parts))
    context = min(CONTEXT, min(map(len, chosen)) // 4)
    return [_padded(chosen[first : first + together], context) for first in range(0, count, together)]


def _sequences(batch: CalibrationBatch) -> list[Tensor]:
    """The rows without padding."""
    ids, mask, _ = batch
    return [*ids] if mask is None else [row[kept] for row, kept in zip(ids, mask.bool(), strict=True)]


def _padded(rows: Sequence[Tensor], context: int) -> CalibrationBatch:
    ids = torch.nn.utils.rnn.pad_sequence([*rows], batch_first=True)
    lengths = torch.tensor([[len(row)] for row in rows], device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths
    return CalibrationBatch(ids, None if mask.all() else mask, context)


def batches_digest(batches: Sequence[CalibrationBatch]) -> str:
    """SHA-256 of all token ids, in hexadecimal."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(batch.input_ids.cpu().numpy().tobytes())
    return digest.hexdigest()
