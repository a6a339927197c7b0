"""Calls of the CUDA kernels, for the emulator and for a card."""

from __future__ import annotations

import torch
from torch import Tensor

from grasp_kernels import Factors
from tests.ops.inputs import DTYPES, factors, normal, pivoted, seeded
from tests.pairwise import Case, pairwise

CASES = pairwise(
    rows=(16, 1, 9, 2, 8, 5, 3, 4),
    K=(700, 1100, 128, 63, 16),
    rank=(208, 5, 40, 300, 32, 1),
    N=(63, 128, 40, 16),
    dtype=DTYPES,
    path=("dependent", "pair", "cooperative"),
    layout=("contiguous", "sliced", "transposed"),
    s=("own", "none", "fp32"),
    bias=(True, False),
    seed=(1, 0, 2),
    processors=(3, 16, 1),
    pivoted=(False, True),
)


def inputs(case: Case, device: str = "cpu") -> tuple[Tensor, Factors]:
    """x and the factors of a case; pivoted ones have a rank below N and no s."""
    generator = seeded()
    options = {"dtype": case["dtype"], "layout": case["layout"], "device": device}
    x = normal((case["rows"], case["K"]), generator, **options)
    if case["pivoted"]:
        rank = min(case["rank"], case["N"] - 1)
        return x, pivoted(case["N"], case["K"], rank, generator, bias=case["bias"], **options)
    group = factors(case["N"], case["K"], case["rank"], generator, s=case["s"] != "none", bias=case["bias"], **options)
    return x, group if case["s"] != "own" else group._replace(s=group.s.to(case["dtype"]))


def small() -> tuple[Tensor, list[Factors]]:
    """A small call without special properties."""
    generator = seeded()
    x = normal((1, 64), generator, dtype=torch.bfloat16)
    return x, [factors(40, 64, 16, generator, s=False, bias=False, dtype=torch.bfloat16)]
