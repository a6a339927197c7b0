"""Time sweeps that gather covariances, and second moments at full rank, against a sweep that gathers nothing.

Tokens and factors are random, since times depend on shapes alone. Statistics are timed only if those of a short batch
equal the results of plain matmuls in fp64.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.compression.output import saved
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.providers import pick_layers
from grasp.bench.timing import Sample, turns
from grasp.builtin import BUILTIN
from grasp.cli.arguments import parse_layers
from grasp.cli.console import print_table
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.evaluation.generation import now
from grasp.loading import DTYPES, load_model
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder, layer_targets, vocabulary_size
from grasp.statistics.covariance import covariance_bytes, gather_covariances
from grasp.statistics.moments import basis_moments
from grasp.statistics.sweep import Call, capture_prefix, sweep

BARE, COVARIANCES, MOMENTS = "bare sweep", "covariances", "moments"
CHECKED_TOKENS = 48
TOLERANCE = 1e-4  # norm-wise and relative, for fp32 sums over so few tokens


class Sizes(NamedTuple):
    """Layers to sweep through, and numbers of tokens."""

    layers: tuple[int, ...]
    sequences: int
    seq_len: int
    batch_size: int
    repeats: int


@dataclass(frozen=True)
class StatisticsResult:
    """Time of a sweep with one kind of statistics, one line of the output."""

    model: str
    provider: str
    dtype: str  # of the sweep
    layers: tuple[int, ...]
    sequences: int
    seq_len: int
    batch_size: int
    repeats: int
    statistics_bytes: int
    seconds_per_sequence: float  # median
    spread: float  # distance between the quartiles of the times, fraction of their median
    added: float  # median ratio of the time to the bare sweep's, repetition by repetition, minus 1
    largest_difference: float  # norm-wise relative error of any linear's statistics on the short batch
    conditions: Conditions


def random_batches(model: PreTrainedModel, sequences: int, seq_len: int, batch_size: int) -> list[CalibrationBatch]:
    """Random tokens, ``batch_size`` sequences at a time."""
    ids = torch.randint(vocabulary_size(model), (sequences, seq_len), generator=torch.Generator().manual_seed(0))
    return [CalibrationBatch(part) for part in ids.split(batch_size)]


def random_factors(target: Target) -> SVD:
    """Factors of full rank, in the dtype of sums."""
    weight = dense_weight(target.module)
    rank, dtype = min(weight.shape), torch.promote_types(weight.dtype, torch.float32)
    U, Vh = (
        torch.randn(shape, dtype=dtype).to(weight.device) for shape in ((len(weight), rank), (rank, weight.shape[1]))
    )
    return SVD(U, torch.ones(rank, dtype=dtype, device=weight.device), Vh)


def difference(model: PreTrainedModel, factors: Mapping[Target, SVD], dtype: str | None) -> float:
    """Largest norm-wise relative error of any statistic of a short batch, from plain matmuls in fp64."""
    batches = random_batches(model, 2, CHECKED_TOKENS // 2, 2)
    prefix = capture_prefix(model, batches, {min(target.layer for target in factors)}, dtype=dtype)
    exact: defaultdict[Target, list[Tensor]] = defaultdict(list)

    def visit(call: Call) -> None:
        x, d, (U, _, Vh) = call.x.double(), call.grad_y.double(), factors[call.target]
        token = (d @ U.double()) * (x @ Vh.double().mT)
        exact[call.target] += [x.mT @ x, d.mT @ d, token.sum(0), token.square().sum(0)]

    sweep(prefix, factors, visit)
    covariances = gather_covariances(prefix, factors)
    moments = basis_moments(prefix, factors, second=True)
    errors = [
        torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected)
        for target, sums in exact.items()
        for got, expected in zip((*covariances[target][:2], *moments[target]), sums, strict=True)
        if isinstance(got, Tensor)
    ]
    return float(torch.stack(errors).max())  # NaN if one is


def time_sweeps(calls: Mapping[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, Sample]:
    """Time all calls in turns; the first repetition warms up and is left out."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    schedule = list(turns(list(calls), repeats + 1))
    for repetition, name in track(schedule, "timing", console=Console(stderr=True)):
        start = now(device)
        calls[name]()
        if repetition:
            times[name].append(now(device) - start)
    return {name: Sample(tuple(seconds)) for name, seconds in times.items()}


def measure(
    name: str,
    model: PreTrainedModel,
    factors: Mapping[Target, SVD],
    sizes: Sizes,
    sweep_dtype: str | None,
    largest: float,
) -> Iterator[StatisticsResult]:
    """Time all sweeps; ``sweep_dtype`` is ``None`` for the model's own, and ``largest`` is from ``difference``."""
    dtype = sweep_dtype or str(model.dtype).removeprefix("torch.")
    facts = conditions(measure_card(device := first_device(model), getattr(torch, dtype)), device)
    batches = random_batches(model, sizes.sequences, sizes.seq_len, sizes.batch_size)
    prefix = capture_prefix(model, batches, {sizes.layers[0]}, dtype=sweep_dtype)
    sweeps: dict[str, Callable[[], object]] = {
        BARE: lambda: sweep(prefix, factors, lambda call: None),
        COVARIANCES: lambda: gather_covariances(prefix, factors),
        MOMENTS: lambda: basis_moments(prefix, factors, second=True),
    }
    samples = time_sweeps(sweeps, sizes.repeats, device)
    statistics_bytes = {
        BARE: 0,
        COVARIANCES: covariance_bytes(factors),
        MOMENTS: sum(2 * svd.S.nbytes + svd.U.nbytes + svd.Vh.nbytes for svd in factors.values()),
    }
    for provider, sample in samples.items():
        yield StatisticsResult(
            *(name, provider, dtype, *sizes),
            statistics_bytes=statistics_bytes[provider],
            seconds_per_sequence=sample.median / sizes.sequences,
            spread=sample.spread,
            added=1 / sample.speedup_over(samples[BARE]) - 1,
            largest_difference=largest,
            conditions=facts,
        )


def print_results(results: Sequence[StatisticsResult]) -> None:
    """Print one row per provider."""
    first, rows = results[0], []
    for result in results:
        row = (f"{result.statistics_bytes / 1e6:.1f}", f"{result.seconds_per_sequence:.3f}", f"{result.spread:.0%}")
        rows.append((result.provider, *row, f"{result.added:.1%}"))
    sizes = f"{len(first.layers)} layers, {first.sequences} × {first.seq_len} tokens, batch {first.batch_size}"
    title = f"{first.model}, {first.dtype}, {sizes}"
    print_table(("statistics", "MB", "s/sequence", "IQR", "added"), rows, title=title)


def main(
    model: Annotated[str, typer.Argument(help="Hub name, folder, GGUF file, or builtin.")] = BUILTIN,
    num_layers: Annotated[int, typer.Option(min=1, help="Number of layers in the middle.")] = 6,
    layers: Annotated[str | None, typer.Option(help="Instead: these layers, such as 3,4,5.")] = None,
    sequences: Annotated[int, typer.Option(min=1)] = 4,
    seq_len: Annotated[int, typer.Option(min=2)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Turns of every sweep.")] = 5,
    dtype: Annotated[str, typer.Option(help=f"Dtype of the model: auto, or one of {', '.join(DTYPES)}.")] = "float32",
    sweep_dtype: Annotated[str | None, typer.Option(help="bfloat16. Default: the model's dtype.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: PyTorch's choice.")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time a sweep that gathers covariances, and one that gathers moments, against one that gathers nothing.

    Example: python -m benchmarks.compression.statistics_cost builtin --num-layers 6 --threads 2 -o statistics.jsonl
    """
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console()
    try:
        loaded, _ = load_model(model, dtype=dtype)
        chosen = pick_layers(None if layers is None else parse_layers(layers), num_layers, len(decoder(loaded).layers))
        GraspConfig(sweep_dtype=sweep_dtype)  # checks the name
    except (GraspError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    factors = {target: random_factors(target) for layer in chosen for target in layer_targets(loaded, layer)[0]}
    largest = difference(loaded, factors, sweep_dtype)
    if not largest <= TOLERANCE:
        console.print(f"WRONG: a statistic differs from fp64 by {largest:.1e}, nothing was timed")
        raise typer.Exit(1)
    sizes = Sizes(tuple(chosen), sequences, seq_len, batch_size, repeats)
    results = list(saved(measure(model, loaded, factors, sizes, sweep_dtype, largest), output))
    now = results[0].conditions
    console.print(f"{now.processor}, statistics differ from fp64 by at most {largest:.0e}")
    print_results(results)


if __name__ == "__main__":
    typer.run(main)
