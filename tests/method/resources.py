"""FLOPs and memory that operations take."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests import command_line

MEASURE = """
import json, sys, torch
from grasp.bench.memory import peak_bytes_above_now
from grasp.method.least_squares import Moments, Products, fit_weight, least_squares, sampled_rows
from grasp.method.pivoting import pivot
from grasp.method.rounding import round_to_outputs
from grasp.method.storage import Storage
from grasp.method.svd import Projected, decompose_in

torch.set_num_threads(1)
square = lambda width: torch.eye(width) + 0.5
for operation, (n, k), rank in json.loads(sys.argv[1]):
    W, inputs, outputs = torch.randn(n, k), square(k), square(n)
    U, Vh, narrow = torch.randn(n, rank), torch.randn(rank, k), W.bfloat16()
    carried = lambda weight: fit_weight(weight, Moments(0.9 * inputs, inputs, 1000))
    few = torch.randn(len(W[sampled_rows(n)]), rank)
    half = Products(square(rank) * 1e-3, few, 500)
    call = {
        "least_squares": lambda: least_squares(U, Vh, W, Moments(inputs, inputs, 1000), half),
        "pivot": lambda: pivot(U, Vh),
        "rounding": lambda: round_to_outputs(carried(narrow.float()), inputs, Storage(4, 64)),
        "inputs": lambda: decompose_in(W, inputs, None, rank=rank),
        "outputs": lambda: decompose_in(W, None, outputs, rank=rank),
        "none": lambda: decompose_in(narrow, None, None),
        "both": lambda: decompose_in(W, inputs, outputs, rank=rank),
        "projected": lambda: decompose_in(W, inputs, Projected(inputs, torch.ones(n)), rank=rank),
    }[operation]
    call()  # libraries take their memory
    print(peak_bytes_above_now(call))
"""
Case = tuple[str, tuple[int, int], int]  # operation, (N, K), rank


class _Products(TorchDispatchMode):
    """Counts the FLOPs of matrix products, also of those in place."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default):
            left, right = [arg for arg in args if isinstance(arg, Tensor)][-2:]
            self.flops += 2 * left.numel() * right.shape[1]
        return func(*args, **(kwargs or {}))


def matmul_flops(call: Callable[[], object]) -> int:
    """FLOPs of the matrix products of a call."""
    with _Products() as products:
        call()
    return products.flops


def peaks_of(cases: Sequence[Case]) -> list[int]:
    """Peak bytes of operations beyond their arguments, in a process that gives freed memory back at once."""
    if sys.platform != "linux":
        pytest.skip("the peak is read from /proc")
    ran = subprocess.run(
        [sys.executable, "-c", MEASURE, json.dumps(cases)],
        env=command_line.environment() | {"MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr
    return [int(line) for line in ran.stdout.split()]
