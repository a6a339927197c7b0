from __future__ import annotations

import pytest
import safetensors.torch
import torch

from grasp.compression.selection import Selection
from grasp.method.knapsack import DENSE


def selection() -> Selection:
    U, Vh = torch.randn(6, 3), torch.randn(3, 5)
    importance = torch.tensor([1.0, 5.0, 0.0, 3.0, 2.0])
    return Selection(U, torch.tensor([9.0, 7.0, 4.0]), Vh, torch.tensor([0, 1, 3]), importance, torch.arange(5.0))


def test_truncation_retains_the_most_important_of_the_retained_groups() -> None:
    before = selection()
    after = before.truncated(2)
    assert after.indices.tolist() == [1, 3]
    assert torch.equal(after.U, before.U[:, 1:])
    assert torch.equal(after.S, before.S[1:])
    assert torch.equal(after.Vh, before.Vh[1:])
    assert torch.equal(after.importance, before.importance)
    assert before.truncated(DENSE).skipped == "stays dense: the budget does more elsewhere"


@pytest.mark.parametrize("sent", [selection(), Selection.skip("its output does not reach the loss: σ = 0")])
def test_a_selection_is_the_same_after_transport(sent: Selection) -> None:
    received = Selection.from_tensors(safetensors.torch.load(safetensors.torch.save(sent.to_tensors())))
    assert received.skipped == sent.skipped
    for name, tensor in sent.to_tensors().items():
        assert torch.equal(received.to_tensors()[name], tensor)
