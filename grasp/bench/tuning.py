"""Tunes the Triton kernels' launch configurations for the linears of a model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from grasp.errors import GraspError
from grasp.loading import DTYPES
from grasp.progress import Progress, no_progress
from grasp_kernels.shapes import GroupShape, format_shape, parse_shape

# Llama-2-7B at retain_ratio 0.1: q/k/v, o, gate/up, down.
SHAPES = (
    "4096x4096r204+4096x4096r204+4096x4096r204",
    "4096x4096r204",
    "4096x11008r298+4096x11008r298",
    "11008x4096r298",
)


def tune(
    shapes: Sequence[str],
    rows: Sequence[int],
    *,
    dtype: str = "bfloat16",
    output: Path | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Measure launch configurations on this GPU and write one file per kernel, in place of an earlier one.

    Args:
        shapes: as ``grasp_kernels.shapes.parse_shape`` reads them. Pairs of one width are tuned as gated linear units
            as well.
        rows: tokens per call.
        dtype: of inputs and factors.
        output: folder of the files; ``None`` for the installed package, where they are found again.
        progress: called after each file.

    Raises:
        ValueError: if a shape or ``dtype`` is none.
        GraspError: if there is no CUDA GPU.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    parsed = [parse_shape(shape) for shape in shapes]
    if not torch.cuda.is_available():
        raise GraspError("tuning measures kernels on a CUDA GPU, and PyTorch sees none here; run it where there is one")
    autotune = import_module("grasp_kernels.autotune")  # imports Triton
    calls: dict[str, list[GroupShape]] = {"lowrank_linear": parsed, "lowrank_glu": [s for s in parsed if _is_gated(s)]}
    files: list[Path] = []
    wanted = {kernel: of_kernel for kernel, of_kernel in calls.items() if of_kernel}
    for done, (kernel, of_kernel) in enumerate(wanted.items(), start=1):
        workloads = [
            autotune.Workload(count, shape[0].K, tuple((linear.N, linear.R) for linear in shape), DTYPES[dtype])
            for shape in of_kernel
            for count in rows
        ]
        files.append(autotune.tune(kernel, workloads, directory=output or autotune.CONFIGS))
        progress(f"tuning {kernel} for {', '.join(map(format_shape, of_kernel))}", done, len(wanted))
    return files


def _is_gated(shape: GroupShape) -> bool:
    return len(shape) == 2 and shape[0].N == shape[1].N
