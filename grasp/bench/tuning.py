"""Find the fastest launch configurations of the Triton kernels for the linears of a model."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import torch

from grasp.bench.workloads import ATTENTION, DOWN, GATE_UP, QKV
from grasp.errors import GraspError
from grasp.files import require_writable
from grasp.loading import DTYPES
from grasp.progress import Progress, no_progress
from grasp_kernels.shapes import GroupShape, format_shape, parse_shape

SHAPES = (QKV, ATTENTION, GATE_UP, DOWN)  # all linears of Llama-2-7B
PIVOTED = ("lowrank_linear", "lowrank_glu")  # kernels that take pivoted factors
GRADIENT_TOKENS = (512, 2048, 8192)  # of a call during calibration


def tune(
    shapes: Sequence[str],
    rows: Sequence[int],
    *,
    dtype: str = "bfloat16",
    output: Path | None = None,
    progress: Progress = no_progress,
) -> list[Path]:
    """Measure launch configurations on this GPU and write one file per kernel, replacing an earlier file.

    Args:
        shapes: as ``grasp_kernels.shapes.parse_shape`` reads them. Pairs with the same N are also tuned as gated
            linear units; both as U and Vh, and as pivoted factors if all ranks are below N. The singular-value gradient
            is tuned at their ranks and at full rank.
        rows: tokens per call; the gradient has ``GRADIENT_TOKENS`` instead.
        dtype: of inputs and factors.
        output: folder of the files; ``None`` for the installed package, which reads them.
        progress: called after each file.

    Raises:
        ValueError: if a shape cannot be parsed or ``dtype`` is unknown.
        GraspError: if there is no CUDA GPU.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {dtype!r}")
    parsed = [parse_shape(shape) for shape in shapes]
    if not torch.cuda.is_available():
        raise GraspError("tuning needs a CUDA GPU, and PyTorch finds none; run it on a machine with one")
    autotune = import_module("grasp_kernels.autotune")  # imports Triton
    folder = output or autotune.CONFIGS
    require_writable(folder / "new.json", parents=True)
    calls = {
        "lowrank_linear": (parsed, rows),
        "lowrank_glu": ([shape for shape in parsed if _is_gated(shape)], rows),
        "singular_value_grad": (_gradient_shapes(parsed), GRADIENT_TOKENS),
    }
    calls = {kernel: (group_shapes, counts) for kernel, (group_shapes, counts) in calls.items() if group_shapes}
    files: list[Path] = []
    for done, (kernel, (group_shapes, counts)) in enumerate(calls.items(), start=1):
        workloads = [
            autotune.Workload(count, shape[0].K, tuple((N, R) for _, N, R in shape), DTYPES[dtype], pivoted)
            for shape in group_shapes
            for count in counts
            for pivoted in ((False, True) if kernel in PIVOTED and all(R < N for _, N, R in shape) else (False,))
        ]
        files.append(autotune.tune(kernel, workloads, directory=folder))
        progress(f"tuning {kernel} for {', '.join(map(format_shape, group_shapes))}", done, len(calls))
    return files


def _gradient_shapes(shapes: Sequence[GroupShape]) -> list[GroupShape]:
    """One linear of each rank and full rank: the ratio of the two routes depends little on N and K."""
    linears = [linear for shape in shapes for linear in shape]
    linears += [linear._replace(R=min(linear.K, linear.N)) for linear in linears]
    return [(linear,) for linear in {linear.R: linear for linear in linears}.values()]


def _is_gated(shape: GroupShape) -> bool:
    return len(shape) == 2 and shape[0].N == shape[1].N
