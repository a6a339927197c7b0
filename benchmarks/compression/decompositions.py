"""Time decompositions and least-squares fits of linears of given shapes, and extrapolate to larger shapes by FLOPs.

Weights and covariances are random, since times depend on shapes alone. Nothing is timed unless the loss that a small
decomposition predicts, and the loss that its truncation has, equal those of an SVD in fp64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor

from benchmarks.compression.output import saved
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.memory import peak_bytes_above_now
from grasp.bench.timing import Sample
from grasp.cli.console import print_table
from grasp.evaluation.generation import now as synchronized_time
from grasp.loading import find_device
from grasp.method.least_squares import (
    PRIOR_TOKENS,
    Moments,
    Products,
    least_squares,
    least_squares_bytes,
    least_squares_flops,
    sampled_rows,
)
from grasp.method.ranks import Shape, break_even_rank
from grasp.method.svd import DAMPING, decompose_in, decomposition_bytes, decomposition_flops

DECOMPOSITION, LEAST_SQUARES = "decomposition", "least squares"
CHECKED_SHAPES: tuple[Shape, ...] = ((96, 64), (64, 96))
TOLERANCE = 1e-4  # relative, of the losses
MATMUL_SIZE = 2048
TOKENS = 512  # random tokens of a covariance: the time does not depend on their number


@dataclass(frozen=True)
class DecompositionResult:
    """Time of one operation on one shape, one line of the output."""

    operation: str
    shape: Shape  # (N, K)
    rank: int  # groups that are returned
    flops: int
    estimated_bytes: int  # beyond the arguments
    peak_bytes: int | None  # the largest of the calls; ``None`` if unknown
    repeats: int  # 0: extrapolated
    extrapolated_from: Shape | None  # the shape whose FLOP/s are assumed
    seconds: float  # median; on a CPU, processor time over threads
    spread: float  # distance between the quartiles of the times, fraction of their median
    floor_seconds: float  # at the FLOP/s of a large matmul in fp64
    largest_difference: float  # relative, of a predicted or real loss of a small shape from that of an SVD in fp64
    conditions: Conditions

    @property
    def rate(self) -> float:
        """FLOP/s."""
        return self.flops / self.seconds


def random_covariance(width: int, device: torch.device) -> Tensor:
    """Random tokens of very different scales per feature, (width, width) fp32."""
    tokens = torch.randn(TOKENS, width, device=device) * torch.logspace(-2, 1, width, device=device)
    return tokens.mT @ tokens / TOKENS


def difference(device: torch.device) -> float:
    """Largest relative difference of both operations on small weights from fp64: losses after any cut, and outputs."""
    worst: list[Tensor] = []
    for n, k in CHECKED_SHAPES:
        W, A, B = torch.randn(n, k, device=device), random_covariance(k, device), random_covariance(n, device)
        rank = break_even_rank((n, k), "factored")
        few = decompose_in(W, A, B, rank=rank)
        U, S, Vh = (factor.double().cpu() for factor in decompose_in(W, A, B))
        kept = (few.U.double().cpu() * S[:rank]) @ few.Vh.double().cpu() - (U[:, :rank] * S[:rank]) @ Vh[:rank]
        worst.append(torch.linalg.vector_norm(kept) / torch.linalg.vector_norm(W.double().cpu()))
        fitted = least_squares(few.U, few.Vh, W, Moments(A, A, TOKENS)).double().cpu()
        expected = _fitted(*(tensor.double().cpu() for tensor in (few.U, few.Vh, W, A)))
        worst.append(torch.linalg.vector_norm(fitted - expected) / torch.linalg.vector_norm(expected))
        left, right = (_root(covariance.double().cpu()) for covariance in (B, A))
        scaled = left.mT @ W.double().cpu() @ right
        values = torch.linalg.svdvals(scaled)
        for rank in range(len(values)):
            exact = values[rank:].square().sum()
            error = scaled - left.mT @ (U[:, :rank] * S[:rank]) @ Vh[:rank] @ right
            losses = torch.stack([S[rank:].square().sum(), error.square().sum()])
            worst.append((losses / exact - 1).abs().max())
    return float(torch.stack(worst).max())  # NaN if one is


def _fitted(U: Tensor, Vh: Tensor, W: Tensor, A: Tensor) -> Tensor:
    """What ``least_squares`` computes, by its definition in fp64, with the same inputs in both models."""
    gram = Vh @ A @ Vh.mT
    ridge = PRIOR_TOKENS / TOKENS * gram.diagonal().mean()
    damped = gram + ridge * torch.eye(len(gram), dtype=gram.dtype)
    return torch.linalg.solve(damped, W @ A @ Vh.mT + ridge * U, left=False)


def _root(covariance: Tensor) -> Tensor:
    damping = DAMPING * covariance.diagonal().mean() * torch.eye(len(covariance), dtype=covariance.dtype)
    return torch.linalg.cholesky(covariance + damping)


def calls(shape: Shape, device: torch.device) -> dict[str, Callable[[], object]]:
    """Both operations on random matrices, with the groups that are fewer parameters than the weight."""
    n, k = shape
    rank = break_even_rank(shape, "factored")
    weight, inputs, outputs = (
        torch.randn(n, k, device=device),
        random_covariance(k, device),
        random_covariance(n, device),
    )
    U, Vh = torch.randn(n, rank, device=device), torch.randn(rank, k, device=device)
    projected = inputs @ Vh.mT / 2
    half = Products(Vh @ projected, weight[sampled_rows(n)] @ projected, 500)
    return {
        DECOMPOSITION: lambda: decompose_in(weight, inputs, outputs, rank=rank),
        LEAST_SQUARES: lambda: least_squares(U, Vh, weight, Moments(inputs, inputs, 1000), half),
    }


def cost(operation: str, shape: Shape) -> tuple[int, int]:
    """FLOPs, and bytes beyond the arguments."""
    rank = break_even_rank(shape, "factored")
    if operation == LEAST_SQUARES:
        return least_squares_flops(shape, rank), least_squares_bytes(shape, rank)
    return (
        decomposition_flops(shape, inputs=True, outputs=True, rank=rank),
        decomposition_bytes(shape, inputs=True, outputs=True, rank=rank),
    )


def measure(
    shapes: Sequence[Shape], repeats: int, device: torch.device, largest: float
) -> Iterator[DecompositionResult]:
    """Time both operations on all shapes, one shape after the other; ``largest`` is from ``difference``."""
    facts = conditions(measure_card(device, torch.float32), device)
    rate = matmul_rate(device)
    for shape in track(shapes, "timing", console=Console(stderr=True)):
        for operation, call in calls(shape, device).items():
            times, peaks = zip(*(timed(call, device) for _ in range(repeats)), strict=True)
            flops, estimated = cost(operation, shape)
            yield DecompositionResult(
                operation=operation,
                shape=shape,
                rank=break_even_rank(shape, "factored"),
                flops=flops,
                estimated_bytes=estimated,
                peak_bytes=None if None in peaks else max(peaks),
                repeats=repeats,
                extrapolated_from=None,
                seconds=Sample(times).median,
                spread=Sample(times).spread,
                floor_seconds=flops / rate,
                largest_difference=largest,
                conditions=facts,
            )


def timed(call: Callable[[], object], device: torch.device) -> tuple[float, int | None]:
    """Seconds and peak bytes of one call."""
    times: list[float] = []
    peak = peak_bytes_above_now(lambda: times.append(seconds(call, device)), device)
    return times[0], peak


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large matmul in fp64."""
    matrix = torch.randn(MATMUL_SIZE, MATMUL_SIZE, device=device, dtype=torch.float64)
    return 2 * MATMUL_SIZE**3 / min(seconds(lambda: matrix @ matrix, device) for _ in range(5))


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Seconds of one call. On a CPU, processor time over threads: other work on the machine is not counted."""
    if device.type == "cpu":
        start = time.process_time()
        call()
        return (time.process_time() - start) / torch.get_num_threads()
    start = synchronized_time(device)
    call()
    return synchronized_time(device) - start


def extrapolate(measured: Sequence[DecompositionResult], shape: Shape) -> list[DecompositionResult]:
    """The results for a shape at the FLOP/s of the largest shape measured among those nearest to its N / K."""

    def nearness(result: DecompositionResult) -> tuple[float, int]:
        n, k = result.shape
        return -abs(math.log(n * shape[1] / (k * shape[0]))), result.flops

    last = {result.operation: result for result in sorted(measured, key=nearness)}
    results = []
    for operation, source in last.items():
        flops, estimated = cost(operation, shape)
        scale = flops / source.flops
        results.append(
            replace(
                source,
                shape=shape,
                rank=break_even_rank(shape, "factored"),
                flops=flops,
                estimated_bytes=estimated,
                peak_bytes=None,
                repeats=0,
                extrapolated_from=source.shape,
                seconds=scale * source.seconds,
                spread=0.0,
                floor_seconds=scale * source.floor_seconds,
            )
        )
    return results


def print_results(results: Sequence[DecompositionResult]) -> None:
    """Print one row per operation and shape."""
    rows = [
        (
            result.operation,
            "{} × {}".format(*result.shape),
            str(result.rank),
            f"{result.flops / 1e9:.1f}",
            f"{result.estimated_bytes / 1e6:.0f}",
            "" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.0f}",
            f"{result.seconds:.2f}",
            f"{result.rate / 1e9:.1f}",
            f"{result.floor_seconds:.2f}",
            "extrapolated" if result.extrapolated_from else "",
        )
        for result in results
    ]
    print_table(("operation", "N × K", "rank", "GFLOP", "MB", "peak", "s", "GFLOP/s", "floor s", ""), rows)


def parse_shapes(text: str) -> list[Shape]:
    """``"4096x14336,512x512"``.

    Raises:
        ValueError: if it is not a list of shapes.
    """
    shapes = []
    for part in filter(None, text.split(",")):
        numbers = part.split("x")
        if len(numbers) != 2 or not all(number.isdecimal() and int(number) > 1 for number in numbers):
            raise ValueError(f"expected shapes of two numbers above 1 such as 4096x14336,512x512; got {text!r}")
        shapes.append((int(numbers[0]), int(numbers[1])))
    return shapes


def main(
    shapes: Annotated[str, typer.Argument(help="N x K of the weights to time.")] = "1024x1024,1024x2816,2816x1024",
    extrapolated: Annotated[str, typer.Option(help="Shapes to extrapolate to by FLOPs.")] = "",
    repeats: Annotated[int, typer.Option(min=1, help="Calls per operation and shape.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")] = "cpu",
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time ``decompose_in`` with both covariances, and ``least_squares``, on random weights.

    Example: python -m benchmarks.compression.decompositions 1024x1024 --extrapolated 8192x28672 -o svd.jsonl
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    try:
        measured_shapes, other_shapes, place = parse_shapes(shapes), parse_shapes(extrapolated), find_device(device)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    largest = difference(place)
    if not largest <= TOLERANCE:
        console.print(f"WRONG: a loss differs from that of an SVD in fp64 by {largest:.1e}, nothing was timed")
        raise typer.Exit(1)
    results = list(saved(measure(measured_shapes, repeats, place, largest), output))
    further = (result for shape in other_shapes for result in extrapolate(results, shape))
    results += list(saved(further, output))
    console.print(f"{results[0].conditions.processor}, losses differ from fp64 by at most {largest:.0e}")
    print_results(results)


if __name__ == "__main__":
    typer.run(main)
