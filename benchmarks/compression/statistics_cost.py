"""Time what statistics add to a sweep: covariances, and second moments at full rank, against a sweep that gathers none.

Tokens and factors are random: a time depends on their shapes alone. Nothing is timed unless the statistics of a short
batch are those that plain matmuls give in fp64.
"""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from transformers import PreTrainedModel

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.providers import pick_layers
from grasp.bench.timing import Sample
from grasp.builtin import BUILTIN
from grasp.cli.arguments import parse_layers
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.loading import DTYPES, load_model
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.dense import dense_weight
from grasp.model.running import first_device
from grasp.model.targets import Target, decoder, layer_targets
from grasp.statistics.covariance import covariance_bytes, gather_covariances
from grasp.statistics.moments import basis_moments
from grasp.statistics.sweep import Call, Prefix, capture_prefix, sweep

BARE, COVARIANCES, MOMENTS = "bare sweep", "covariances", "moments"
CHECKED_TOKENS = 48
TOLERANCE = 1e-4  # norm-wise and relative, of fp32 sums over so few tokens


@dataclass(frozen=True)
class Result:
    """One kind of statistics, one line of the output."""

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
    added: float  # time over that of the bare sweep, repetition by repetition, median, less 1
    largest_difference: float  # from fp64, norm-wise and relative, of any linear's statistics on the short batch
    conditions: Conditions


def random_batches(model: PreTrainedModel, sequences: int, seq_len: int, batch_size: int) -> list[CalibrationBatch]:
    """Random tokens, ``batch_size`` sequences at a time."""
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(vocabulary, (sequences, seq_len), generator=torch.Generator().manual_seed(0))
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
    """The largest difference of any statistic of a short batch from plain matmuls in fp64, relative to their norm."""
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
    return max(
        float(torch.linalg.vector_norm(got.double() - expected) / torch.linalg.vector_norm(expected))
        for target, sums in exact.items()
        for got, expected in zip((*covariances[target][:2], *moments[target]), sums, strict=True)
        if got is not None
    )


def providers(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    factors: Mapping[Target, SVD],
    prefix: Prefix,
    dtype: str | None,
) -> dict[str, Callable[[], object]]:
    """What to time: sweeps through the same layers."""
    return {
        BARE: lambda: sweep(prefix, factors, lambda call: None),
        COVARIANCES: lambda: gather_covariances(prefix, factors),
        MOMENTS: lambda: basis_moments(prefix, factors, second=True),
    }


def take_turns(calls: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, Sample]:
    """Time all calls in turn, each repetition starting with another; the first warms up and is left out."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for repetition in track(range(repeats + 1), "timing", console=Console(stderr=True)):
        first = repetition % len(names)
        for name in (*names[first:], *names[:first]):
            start = time.perf_counter()
            calls[name]()
            times[name].append(time.perf_counter() - start)
    return {name: Sample(tuple(seconds[1:])) for name, seconds in times.items()}


def result_table(results: Sequence[Result]) -> Table:
    """The providers of one model."""
    first = results[0]
    table = Table(
        title=f"{first.model}, {first.dtype}, {len(first.layers)} layers\n"
        f"{first.sequences} × {first.seq_len} tokens, batch {first.batch_size}",
        title_justify="left",
    )
    table.add_column("statistics")
    for heading in ("MB", "s/sequence", "IQR", "added"):
        table.add_column(heading, justify="right")
    for each in results:
        row = (f"{each.statistics_bytes / 1e6:.1f}", f"{each.seconds_per_sequence:.3f}", f"{each.spread:.0%}")
        table.add_row(each.provider, *row, f"{each.added:.1%}")
    return table


def main(
    model: Annotated[str, typer.Argument(help="Hub name, folder, GGUF file, or builtin.")] = BUILTIN,
    num_layers: Annotated[int, typer.Option(min=1, help="Gather in this many layers, those in the middle.")] = 6,
    layers: Annotated[str | None, typer.Option(help="These instead, as 3,4,5.")] = None,
    sequences: Annotated[int, typer.Option(min=1)] = 4,
    seq_len: Annotated[int, typer.Option(min=2)] = 512,
    batch_size: Annotated[int, typer.Option(min=1)] = 4,
    repeats: Annotated[int, typer.Option(min=1, help="Times that every sweep gets its turn.")] = 5,
    dtype: Annotated[str, typer.Option(help=f"Of the model: auto, or one of {', '.join(DTYPES)}.")] = "float32",
    sweep_dtype: Annotated[str | None, typer.Option(help="bfloat16, or the model's own if left out.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if left out.")] = None,
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
        GraspConfig(sweep_dtype=sweep_dtype)  # knows which there are
    except (GraspError, ValueError) as error:
        raise typer.BadParameter(str(error)) from error
    factors = {target: random_factors(target) for layer in chosen for target in layer_targets(loaded, layer)[0]}
    apart = difference(loaded, factors, sweep_dtype)
    if not apart <= TOLERANCE:
        console.print(f"WRONG: a statistic differs from fp64 by {apart:.1e}, nothing was timed")
        raise typer.Exit(1)
    ran = sweep_dtype or str(loaded.dtype).removeprefix("torch.")
    now = conditions(measure_card(device := first_device(loaded), getattr(torch, ran)), device)
    batches = random_batches(loaded, sequences, seq_len, batch_size)
    prefix = capture_prefix(loaded, batches, {chosen[0]}, dtype=sweep_dtype)
    times = take_turns(providers(loaded, batches, factors, prefix, sweep_dtype), repeats)
    taken = {
        BARE: 0,
        COVARIANCES: covariance_bytes(factors),
        MOMENTS: sum(2 * svd.S.nbytes + svd.U.nbytes + svd.Vh.nbytes for svd in factors.values()),
    }
    results = [
        Result(
            *(model, name, ran, tuple(chosen), sequences, seq_len, batch_size, repeats),
            statistics_bytes=taken[name],
            seconds_per_sequence=sample.median / sequences,
            spread=sample.spread,
            added=1 / sample.speedup_over(times[BARE]) - 1,
            largest_difference=apart,
            conditions=now,
        )
        for name, sample in times.items()
    ]
    console.print(f"{now.device}, threads: {now.threads}, statistics differ from fp64 by at most {apart:.0e}")
    console.print(result_table(results))
    if output is not None:
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(each)) + "\n" for each in results)


if __name__ == "__main__":
    typer.run(main)
