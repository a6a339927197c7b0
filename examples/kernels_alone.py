"""Use the low-rank ops on plain tensors, without a model and without the package grasp.

python examples/kernels_alone.py
"""

from __future__ import annotations

import torch
from torch import nn

from grasp_kernels import Factors, available_backends, explain, lowrank_linear, lowrank_linear_grouped, pack_factors


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    dense = nn.Linear(512, 1024)
    with torch.no_grad():  # a weight with a decaying spectrum, as trained ones have
        dense.weight.copy_(torch.randn(1024, 64) @ torch.randn(64, 512) / 64 + 0.02 * torch.randn(1024, 512))
    x = torch.randn(4, 512)

    # A linear of rank R: y = x Vhᵀ diag(s) Uᵀ + b. It needs R (N + K) numbers where the dense one needs N K.
    rank = 64
    U, s, Vh = torch.linalg.svd(dense.weight.detach(), full_matrices=False)
    left, values, right = U[:, :rank].contiguous(), s[:rank].contiguous(), Vh[:rank].contiguous()
    factors = Factors(left, values, right, dense.bias.detach())
    y = lowrank_linear(x, *factors)

    # The op computes what two matrix products compute.
    expected = (x @ right.mT * values) @ left.mT + dense.bias
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    error = (y - dense(x)).norm() / dense(x).norm()
    print(f"rank {rank}: {rank * (512 + 1024)} of {512 * 1024} parameters, relative error {error:.2f}")

    # Linears that share an input run in one call. Their ranks may differ.
    smaller = Factors(U[:, :24].contiguous(), s[:24].contiguous(), Vh[:24].contiguous())
    first, second = lowrank_linear_grouped(x, [factors, smaller])
    print(f"grouped: {tuple(first.shape)} and {tuple(second.shape)}")

    # Weights that do not change can be packed once, in the layout that the kernels read fastest.
    packed, _ = pack_factors([factors, smaller])
    torch.testing.assert_close(lowrank_linear(x, *packed), y, rtol=1e-4, atol=1e-4)

    # Which backend runs a call, why the others do not, and whether the call skips PyTorch's dispatcher.
    print(f"backends here: {', '.join(available_backends())}")
    for name, answer in explain("lowrank_linear", rows=len(x), rank=rank).items():
        print(f"  {name}: {answer}")


if __name__ == "__main__":
    main()
