"""Random inputs of the ops, and the backends and devices to try them on."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from grasp_kernels import Factors
from grasp_kernels.dispatch import BACKENDS, OpCall, objection

# fp64 is not in the grid: most backends refuse it, and would skip the pairs of values that only its cases cover.
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
LAYOUTS = ("sliced", "transposed", "contiguous")
# The grid of every op. The first value also fills cases whose pairs are already covered.
GRID: dict[str, Sequence[object]] = {
    "rows": (33, 7, 1, 0),
    "N": (63, 128, 16),
    "K": (128, 63, 16),
    "rank": (5, 32, 8, 1),
    "dtype": DTYPES,
    "layout": LAYOUTS,
    "ndim": (3, 2),
}
SPLIT_ROWS = {33: (3, 11), 7: (7, 1), 1: (1, 1), 0: (2, 0)}
BACKEND_NAMES = tuple(row.name for row in BACKENDS)
DEVICES = ("cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] if torch.cuda.is_available() else []))


def require(backend: str, op: str, x: Tensor, rank: int) -> None:
    """Skip the test if the backend does not run the call, with the reason of its row."""
    row = next(row for row in BACKENDS if row.name == backend)
    reason = objection(row, OpCall(op, x.device, x.dtype, x.shape[:-1].numel(), rank))
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


def seeded(seed: int = 0) -> torch.Generator:
    """A CPU generator: all inputs are drawn on the CPU, so they are the same on every device."""
    return torch.Generator().manual_seed(seed)


def normal(
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    layout: str = "contiguous",
    scale: float = 1.0,
) -> Tensor:
    """A Gaussian tensor: contiguous, transposed in its last two dimensions, or sliced from a larger one full of NaN."""
    values = torch.randn(*shape, generator=generator, dtype=torch.float64).mul(scale).to(device, dtype)
    if layout == "transposed" and len(shape) > 1:
        return values.mT.contiguous().mT
    if layout == "sliced":
        larger = torch.full([size + 3 for size in shape], torch.nan, dtype=dtype, device=device)
        view = larger[tuple(slice(1, 1 + size) for size in shape)]
        return view.copy_(values)
    return values


def tokens(rows: int, features: int, ndim: int, generator: torch.Generator, **options: object) -> Tensor:
    """(rows, features), or with ``ndim`` 3 the same rows in two leading dimensions."""
    leading = (rows,) if ndim == 2 else SPLIT_ROWS[rows]
    return normal((*leading, features), generator, **options)  # type: ignore[arg-type]


def factors(
    N: int,
    K: int,
    rank: int,
    generator: torch.Generator,
    *,
    s: bool,
    bias: bool,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    layout: str = "contiguous",
) -> Factors:
    """Factors that map a Gaussian input to outputs of about unit variance; s is fp32 between 0.5 and 1.5."""
    return Factors(
        normal((N, rank), generator, dtype=dtype, device=device, layout=layout, scale=rank**-0.5),
        (torch.rand(rank, generator=generator) + 0.5).to(device) if s else None,
        normal((rank, K), generator, dtype=dtype, device=device, layout=layout, scale=K**-0.5),
        normal((N,), generator, dtype=dtype, device=device, layout=layout) if bias else None,
    )


def pivoted(
    N: int,
    K: int,
    rank: int,
    generator: torch.Generator,
    *,
    bias: bool = False,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    layout: str = "contiguous",
) -> Factors:
    """Pivoted factors; both parts of ``order`` are ascending, as ``grasp.method.pivoting`` gives them."""
    group = factors(N, K, rank, generator, s=False, bias=bias, dtype=dtype, device=device, layout=layout)
    pivots, others = torch.randperm(N, generator=generator).split([rank, N - rank])
    order = torch.cat([pivots.sort().values, others.sort().values])
    return group._replace(U=group.U[: N - rank], order=order.to(device, torch.int32))


def double(group: Factors) -> Factors:
    """The same values in float64."""
    U, s, Vh, bias = (None if tensor is None else tensor.double() for tensor in group[:4])
    return Factors(U, s, Vh, bias, group.order)  # type: ignore[arg-type]
