"""Measure how the cost of the preset best grows with layers and with tokens, on random Llamas of a small width."""

from __future__ import annotations

import math
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track

from benchmarks.compression.output import saved
from benchmarks.compression.random_llama import RandomLlama, measure
from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.cli.console import print_table
from speedgate.timing import using_threads

SEQ_LEN, BATCH_SIZE = 512, 4
LAYERS, TOKENS = "layers", "tokens"


@dataclass(frozen=True)
class GrowthResult:
    """The cost of one compression, one line of the output."""

    grows: str  # what differs from the other lines of its series, layers or tokens
    llama: RandomLlama
    memory: int | None  # the budget, bytes above the loaded model; None for what is free
    tokens: int
    seconds: float  # of the processor
    peak_bytes: int  # above the loaded model
    disk_bytes: int  # of the run folder
    conditions: Conditions

    @property
    def size(self) -> int:
        """The number that grows."""
        return self.tokens if self.grows == TOKENS else self.llama.layers


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of the least-squares line through ``log cost`` over ``log size``: 1 for a cost that grows linearly."""
    x, y = ([math.log(value) for value in values] for values in (sizes, costs))
    return statistics.linear_regression(x, y).slope


def series(llama: RandomLlama, layers: Sequence[int], tokens: Sequence[int]) -> list[tuple[str, RandomLlama]]:
    """The compressions to measure: all depths with the fewest tokens, all numbers of tokens with the fewest layers."""
    fewest = replace(llama, layers=min(layers), sequences=_sequences(min(tokens)))
    return [
        *((LAYERS, replace(fewest, layers=count)) for count in layers),
        *((TOKENS, replace(fewest, sequences=_sequences(count))) for count in tokens),
    ]


def _sequences(tokens: int) -> int:
    return max(1, round(tokens / SEQ_LEN))


def run(compressions: Sequence[tuple[str, RandomLlama]], memory: int | None, threads: int) -> Iterator[GrowthResult]:
    """Measure all compressions."""
    cpu = torch.device("cpu")
    with using_threads(threads):
        now = conditions(measure_card(cpu, torch.float32), cpu)
    for grows, llama in track(compressions, "compressing", console=Console(stderr=True)):
        with tempfile.TemporaryDirectory() as folder:
            measured = measure(llama, Path(folder) / "run", memory=memory, threads=threads)
        yield GrowthResult(
            grows=grows,
            llama=llama,
            memory=memory,
            tokens=llama.sequences * llama.seq_len,
            seconds=measured.seconds,
            peak_bytes=measured.peak_bytes,
            disk_bytes=measured.disk_bytes,
            conditions=now,
        )


def print_results(results: Sequence[GrowthResult]) -> None:
    """Print one row per compression, and one with the exponents below each series."""
    rows: list[Sequence[str]] = []
    for grows in (LAYERS, TOKENS):
        members = [result for result in results if result.grows == grows]
        costs = [(result.seconds, result.peak_bytes / 1e6, result.disk_bytes / 1e6) for result in members]
        for result, (seconds, peak, disk) in zip(members, costs, strict=True):
            size = str(result.llama.layers), f"{result.tokens:,}"
            rows.append((*size, f"{seconds:.1f}", f"{peak:.0f}", f"{disk:.0f}"))
        sizes = [result.size for result in members]
        if len({*sizes}) > 1:
            slopes = (f"{exponent(sizes, column):.2f}" for column in zip(*costs, strict=True))
            rows.append((f"exponent of {grows}", "", *slopes))
    print_table(("layers", "tokens", "CPU s", "MB of memory", "MB of disk"), rows)


def main(
    layers: Annotated[str, typer.Option(help="Numbers of layers.")] = "2,4,8",
    tokens: Annotated[str, typer.Option(help="Numbers of tokens, in sequences of 512.")] = "12000,48000,200000",
    hidden_size: Annotated[int, typer.Option(min=64, help="A multiple of 64.")] = 128,
    memory: Annotated[int | None, typer.Option(help="Bytes above the loaded model. Default: what is free.")] = None,
    threads: Annotated[int, typer.Option(min=1)] = 1,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Compress random Llamas of several depths, and with several numbers of tokens, and fit how costs grow.

    Example: python -m benchmarks.compression.growth -o growth.jsonl
    """
    llama = RandomLlama(
        layers=0,
        sequences=0,
        seq_len=SEQ_LEN,
        batch_size=BATCH_SIZE,
        hidden_size=hidden_size,
        intermediate_size=hidden_size * 7 // 2,
        heads=hidden_size // 64,
        kv_heads=max(1, hidden_size // 256),
        dtype="float32",
    )
    compressions = series(llama, *([int(number) for number in numbers.split(",")] for numbers in (layers, tokens)))
    print_results(list(saved(run(compressions, memory, threads), output)))


if __name__ == "__main__":
    typer.run(main)
