from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp.method.channels import narrow
from grasp.method.svd import DAMPING

TOKENS = 400


def problem(n: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A weight, and sums of inputs, which depend on one another, and of output gradients."""
    generator = torch.Generator().manual_seed(seed)
    weight, inputs, gradients, mix = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((n, k), (TOKENS, k), (TOKENS, n), (k, k))
    )
    inputs = inputs @ mix
    return weight, inputs.mT @ inputs, gradients.mT @ gradients


def shrunk(total: Tensor) -> Tensor:
    """The covariance, as by one more token for each dimension, and damped."""
    more, mean = len(total), total.diagonal().mean()
    whole = total + more / TOKENS * mean * torch.eye(more, dtype=total.dtype)
    return whole / (TOKENS + more) + DAMPING * mean / TOKENS * torch.eye(more, dtype=total.dtype)


@pytest.mark.parametrize(("n", "k"), [(24, 60), (40, 300), (70, 30)])
def test_the_others_make_up_for_what_is_removed(n: int, k: int) -> None:
    weight, inputs, outputs = problem(n, k)
    A, B = shrunk(inputs), shrunk(outputs)
    widths = [k - 1, k // 2, 5]
    found = narrow(weight, inputs.tril(), outputs.tril(), widths, tokens=TOKENS)
    assert list(found) == widths
    for width, (channels, left, loss) in found.items():
        assert channels.tolist() == sorted({*channels.tolist()})
        assert left.shape == (n, width)
        best = weight @ A[:, channels] @ torch.linalg.inv(A[channels][:, channels])
        torch.testing.assert_close(left, best, rtol=1e-7, atol=1e-7)
        error = weight.clone()
        error[:, channels] -= left
        assert loss == pytest.approx(float(torch.trace(B @ error @ A @ error.mT)), rel=1e-8)


def test_the_one_that_is_missed_least_goes_first() -> None:
    weight, inputs, outputs = problem(12, 16, seed=1)
    A, B = shrunk(inputs), shrunk(outputs)

    def loss_without(channel: int) -> float:
        others = [i for i in range(16) if i != channel]
        error = weight.clone()
        error[:, others] -= weight @ A[:, others] @ torch.linalg.inv(A[others][:, others])
        return float(torch.trace(B @ error @ A @ error.mT))

    losses = [loss_without(channel) for channel in range(16)]
    (channels, _, loss) = narrow(weight, inputs, outputs, [15], tokens=TOKENS)[15]
    assert {*range(16)} - {*channels.tolist()} == {losses.index(min(losses))}
    assert loss == pytest.approx(min(losses))
    more = narrow(weight, inputs, outputs, [15, 8], tokens=TOKENS)
    assert {*more[8].channels.tolist()} < {*more[15].channels.tolist()}
    assert more[8].loss > more[15].loss


def test_copies_of_channels_cost_nothing() -> None:
    weight, inputs, outputs = problem(12, 16)
    twice = torch.cat([inputs, inputs], dim=1).repeat(2, 1)
    channels, _, loss = narrow(torch.cat([weight, weight], dim=1), twice, outputs, [16], tokens=None)[16]
    assert {*(channels % 16).tolist()} == {*range(16)}
    scale = float(torch.trace(outputs @ weight @ inputs @ weight.mT))
    assert loss < 1e-2 * scale


def test_the_result_has_the_dtype_of_the_weight() -> None:
    weight, inputs, outputs = problem(12, 16)
    kept = narrow(weight.bfloat16(), inputs.float(), outputs.float(), [8], tokens=TOKENS)[8]
    assert kept.weight.dtype == torch.bfloat16
    assert kept.channels.dtype == torch.int64
