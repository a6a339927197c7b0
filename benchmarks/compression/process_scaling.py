"""Time a compression in one process and in several processes of one thread each.

The speed-up is compared with that of as many threads in a matrix product of the model's size, timed before and after:
no division of work over the same cores should gain more. Results are reported only if all runs choose the same singular
groups.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from benchmarks.compression.output import saved
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.builtin import BUILTIN
from grasp.calibration import builtin_text, token_batches
from grasp.checkpoint.compression_report import CompressionReport
from grasp.cli.console import print_table
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.loading import load_quietly
from grasp.method.schedules import SCHEDULES
from grasp.statistics.processes import joined
from speedgate.timing import using_threads

CPU = torch.device("cpu")
GEMM = (2048, 576, 1536)  # tokens, features in and out: the MLP of SmolLM2-135M
GEMM_SECONDS = 2.0
ATTRIBUTION = ("prefix", "attribution")  # compared steps of a report


@dataclass(frozen=True)
class ScalingJob:
    """A compression with one sequence per batch."""

    model: str
    schedule: str
    layers: int
    retain_ratio: float
    sequences: int
    seq_len: int


@dataclass(frozen=True)
class ScalingResult:
    """Times with one number of processes, one line of the output."""

    job: ScalingJob
    processes: int
    seconds: Mapping[str, float]  # by step, of rank 0, which waits for the others
    attribution: float  # seconds without block influence and decompositions
    attribution_speedup: float
    total_speedup: float
    thread_speedup: float  # of the matrix product with as many threads
    share_of_thread_speedup: float  # attribution_speedup over thread_speedup
    conditions: Conditions


def worker(job: ScalingJob) -> CompressionReport:
    """Compress in this process, which ``run`` has started."""
    torch.set_num_threads(1)
    model, tokenizer = load_quietly(job.model, device="cpu")
    batches = token_batches(tokenizer, builtin_text("calibration"), num_samples=job.sequences, seq_len=job.seq_len)
    config = GraspConfig(num_layers=job.layers, retain_ratio=job.retain_ratio, schedule=job.schedule)
    with joined(CPU) as processes:
        return compress_(model, batches, config, processes=processes)


def run(job: ScalingJob, processes: int) -> CompressionReport:
    """Compress in new processes of one thread each; the report of rank 0."""
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id="grasp",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="spawn",
    )
    report: CompressionReport = elastic_launch(launch, worker)(job)[0]
    return report


def gemm_seconds(threads: int) -> float:
    """Shortest time of a matrix product with ``threads`` threads."""
    tokens, inputs, outputs = GEMM
    x, weight = torch.randn(tokens, inputs), torch.randn(inputs, outputs)
    best, end = float("inf"), time.perf_counter() + GEMM_SECONDS
    with using_threads(threads):
        while (start := time.perf_counter()) < end:
            x @ weight
            best = min(best, time.perf_counter() - start)
    return best


def measure(job: ScalingJob, counts: Sequence[int]) -> list[ScalingResult]:
    """Run the job with each number of processes; the first number must be 1.

    Raises:
        RuntimeError: if the runs choose different singular groups.
    """
    gemms = {count: [gemm_seconds(count)] for count in counts}
    reports = {count: run(job, count) for count in counts}
    for count in counts:
        gemms[count].append(gemm_seconds(count))
    now = conditions(measure_card(CPU, torch.float32), CPU)
    chosen = {count: [module.indices for module in report.modules] for count, report in reports.items()}
    if any(indices != chosen[counts[0]] for indices in chosen.values()):
        raise RuntimeError(f"{list(counts)} processes chose different singular groups")
    attribution = {count: sum(report.seconds[step] for step in ATTRIBUTION) for count, report in reports.items()}
    total = {count: sum(report.seconds.values()) for count, report in reports.items()}
    results = []
    for count in counts:
        speedup = attribution[counts[0]] / attribution[count]
        threads = min(gemms[counts[0]]) / min(gemms[count])
        results.append(
            ScalingResult(
                job,
                count,
                dict(reports[count].seconds),
                attribution=attribution[count],
                attribution_speedup=speedup,
                total_speedup=total[counts[0]] / total[count],
                thread_speedup=threads,
                share_of_thread_speedup=speedup / threads,
                conditions=now,
            )
        )
    return results


def print_results(results: Sequence[ScalingResult]) -> None:
    """Print one column per number of processes."""
    rows = [
        *((step, *(f"{result.seconds[step]:.1f} s" for result in results)) for step in results[0].seconds),
        (" + ".join(ATTRIBUTION), *(f"{result.attribution:.1f} s" for result in results)),
        ("times as fast", *(f"{result.attribution_speedup:.2f}" for result in results)),
        ("as many threads, matrix product", *(f"{result.thread_speedup:.2f}" for result in results)),
        ("share", *(f"{result.share_of_thread_speedup:.0%}" for result in results)),
    ]
    print_table(("", *(f"{result.processes} of one thread" for result in results)), rows)


def main(
    model: Annotated[str, typer.Argument(help="A model as for `grasp compress`.")] = BUILTIN,
    schedule: Annotated[str, typer.Option(help=", ".join(SCHEDULES))] = "single-sweep",
    layers: Annotated[int, typer.Option(min=1, help="Number of most redundant layers to compress.")] = 6,
    retain_ratio: Annotated[float, typer.Option()] = 0.3,
    sequences: Annotated[int, typer.Option(min=1)] = 24,
    seq_len: Annotated[int, typer.Option(min=2)] = 512,
    processes: Annotated[int, typer.Option(min=2, help="Compared with one process.")] = 2,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time a compression in one process of one thread and in several.

    Example: python -m benchmarks.compression.process_scaling --sequences 24 -o processes.jsonl
    """
    job = ScalingJob(model, schedule, layers, retain_ratio, sequences, seq_len)
    print_results(list(saved(measure(job, (1, processes)), output)))


if __name__ == "__main__":
    typer.run(main)
