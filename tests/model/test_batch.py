from __future__ import annotations

import torch

from grasp.model.batch import CalibrationBatch, excerpt
from tests.tiny_models import tiny_batches


def rows_of(batches: list[CalibrationBatch]) -> list[list[int]]:
    """The sequences, without padding."""
    return [
        row[torch.ones_like(row, dtype=torch.bool) if mask is None else mask].tolist()
        for ids, masks, _ in batches
        for row, mask in zip(ids, [None] * len(ids) if masks is None else masks, strict=True)
    ]


def test_an_excerpt_has_the_first_tokens_of_evenly_spaced_sequences() -> None:
    whole = torch.cat(tiny_batches(6, 2, 16))  # (12, 16)
    batches = [CalibrationBatch(rows) for rows in whole.split(2)]
    few = excerpt(batches, sequences=4, tokens=32)
    assert rows_of(few) == whole[[1, 4, 7, 10], :8].tolist()
    assert [tuple(batch.input_ids.shape) for batch in few] == [(4, 8)]  # as many tokens as in two whole sequences
    assert [len(batch.input_ids) for batch in excerpt(batches, sequences=4, tokens=64)] == [2, 2]
    assert [len(batch.input_ids) for batch in excerpt(batches, sequences=4, tokens=32, parts=3)] == [1, 1, 1, 1]
    assert rows_of(excerpt(batches, sequences=99, tokens=10**6)) == whole.tolist()
    assert rows_of(excerpt(batches, sequences=12, tokens=1)) == whole[:, :2].tolist()


def test_an_excerpt_has_no_padding_and_no_sequence_without_a_token_to_predict() -> None:
    (ids,) = tiny_batches(1, 3, 8)
    mask = torch.arange(8) < torch.tensor([[8], [1], [3]])
    (few,) = excerpt([CalibrationBatch(ids, mask)], sequences=8, tokens=10)
    assert rows_of([few]) == [ids[0, :5].tolist(), ids[2, :3].tolist()]
    assert few.num_targets == 4 + 2


def test_what_the_context_predicts_does_not_count() -> None:
    batches = [CalibrationBatch(rows) for rows in tiny_batches(4, 1, 300)]
    assert {batch.context for batch in excerpt(batches, sequences=4, tokens=400)} == {25}
    (few,) = excerpt(batches, sequences=2, tokens=512)[:1]
    assert few.context == 32
    assert few.is_target.tolist() == [[False] * 32 + [True] * 223]
