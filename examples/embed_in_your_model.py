"""Put low-rank linears into a model of your own: replace, fine-tune, compile, save.

python examples/embed_in_your_model.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp_kernels import lowrank_linear


class LowRank(nn.Module):
    """A linear of rank R with the singular values folded into its factors."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        U, s, Vh = torch.linalg.svd(linear.weight.detach(), full_matrices=False)
        root = s[:rank].sqrt()
        self.U = nn.Parameter((U[:, :rank] * root).contiguous())
        self.Vh = nn.Parameter((root[:, None] * Vh[:rank]).contiguous())
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """``(x @ Vh.mT) @ U.mT + bias``."""
        return lowrank_linear(x, self.U, None, self.Vh, self.bias)


def replace_linears_(model: nn.Module, rank: int) -> None:
    """Replace every linear that factors of this rank make smaller."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and rank * sum(module.weight.shape) < module.weight.numel():
            model.set_submodule(name, LowRank(module, rank))


def train_(model: nn.Module, x: Tensor, y: Tensor, steps: int) -> float:
    """Train on one batch; the last loss. The ops have gradients in all factors."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
    return loss.item()


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    y = torch.stack([x[:, 0] * x[:, 1], x[:, 2].sin()], dim=1)
    model = nn.Sequential(nn.Linear(32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    print(f"dense: loss {train_(model, x, y, 150):.4f}, {sum(p.numel() for p in model.parameters())} parameters")

    replace_linears_(model, rank=16)
    print(f"rank 16: loss {F.mse_loss(model(x), y):.4f}, {sum(p.numel() for p in model.parameters())} parameters")
    print(f"fine-tuned: loss {train_(model, x, y, 150):.4f}")

    # The ops are opaque to torch.compile and break no graph. This backend captures it without a C++ compiler.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    print(f"saved tensors: {', '.join(model.state_dict())}")


if __name__ == "__main__":
    main()
