"""Fail a CI job when a kernel becomes slower: a test file for pytest-speedgate.

On the old commit, and then on the new one, on the same machine:

    python -m pytest -p speedgate.plugin examples/guard_a_kernel_in_ci.py --gate=save
    python -m pytest -p speedgate.plugin examples/guard_a_kernel_in_ci.py --gate=compare

The second command ends with exit code 1 if the kernel is slower by more than 15 %, measured as a ratio to plain calls
that are timed in turns with it. Replace `kernel` and `plain` by calls of your own. A workflow is in
docs/regression-gate.md.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from grasp_kernels import lowrank_linear
from speedgate.fixture import Gate

Operands = tuple[Tensor, Tensor, Tensor]  # x (M, K), U (N, R), Vh (R, K)


def kernel(operands: Operands) -> Tensor:
    """The call to guard."""
    x, U, Vh = operands
    return lowrank_linear(x, U, None, Vh)


def plain(operands: Operands) -> Tensor:
    """The yardstick: about as long, the same part of the machine, and it does not change."""
    x, U, Vh = operands
    return (x @ Vh.mT) @ U.mT


@pytest.mark.parametrize("rows", [1, 8])
def test_lowrank_linear(gate: Gate, rows: int) -> None:
    """One linear of a decoding step. The weights of all copies together are larger than a cache."""
    torch.manual_seed(0)
    copies = [(torch.randn(rows, 1024), torch.randn(1024, 64), torch.randn(64, 1024)) for _ in range(64)]
    torch.testing.assert_close(
        kernel(copies[0]), plain(copies[0]), rtol=1e-4, atol=1e-2
    )  # no speed without correctness
    gate(kernel, plain, copies, label=f"lowrank_linear 1024x1024r64 M={rows} float32", against="two products")
