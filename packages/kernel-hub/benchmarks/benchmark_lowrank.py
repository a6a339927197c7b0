"""The ops against the same products of PyTorch, for ``kernels benchmark``; ``grasp bench ops`` times with more care."""

from __future__ import annotations

import torch
from kernels.benchmark import Benchmark
from torch import Tensor
from torch.nn import functional as F


class LowRank(Benchmark):
    """Linears of 4096 x 4096 and rank 204, and a gated MLP of 4096 x 11008 and rank 298: a tenth of the weights."""

    seed = 0

    def setup(self) -> None:
        self.decode, self.batch = self.random(1, 4096), self.random(16, 4096)
        self.linears = [self.factors(4096, 204) for _ in range(3)]
        self.gate, self.up = self.factors(11008, 298), self.factors(11008, 298)

    def random(self, *shape: int) -> Tensor:
        dtype = torch.float32 if self.device == "cpu" else torch.bfloat16
        return torch.randn(*shape, device=self.device, dtype=dtype) * shape[-1] ** -0.5

    def factors(self, out_features: int, rank: int) -> tuple[Tensor, None, Tensor]:
        return self.random(out_features, rank), None, self.random(rank, 4096)

    def benchmark_linear_1_row(self) -> None:
        self.out = self.kernel.lowrank_linear(self.decode, *self.linears[0])

    def verify_linear_1_row(self) -> Tensor:
        return products(self.decode, self.linears[0])

    def benchmark_linear_16_rows(self) -> None:
        self.out = self.kernel.lowrank_linear(self.batch, *self.linears[0])

    def verify_linear_16_rows(self) -> Tensor:
        return products(self.batch, self.linears[0])

    def benchmark_three_linears_1_row(self) -> None:
        factors = [self.kernel.Factors(*linear) for linear in self.linears]
        self.out = torch.cat(self.kernel.lowrank_linear_grouped(self.decode, factors), dim=-1)

    def verify_three_linears_1_row(self) -> Tensor:
        return torch.cat([products(self.decode, linear) for linear in self.linears], dim=-1)

    def benchmark_gated_1_row(self) -> None:
        gate, up = self.kernel.Factors(*self.gate), self.kernel.Factors(*self.up)
        self.out = self.kernel.lowrank_glu(self.decode, gate, up)

    def verify_gated_1_row(self) -> Tensor:
        return F.silu(products(self.decode, self.gate)) * products(self.decode, self.up)


def products(x: Tensor, factors: tuple[Tensor, None, Tensor]) -> Tensor:
    """The low-rank linear in plain PyTorch."""
    U, _, Vh = factors
    return F.linear(F.linear(x, Vh), U)
