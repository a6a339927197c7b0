"""Time every op on every backend against one dense linear and against two unfused ones.

A backend is timed only where its result at that very shape is right, by the tolerance rule of the tests. Weights rotate
through more memory than a cache holds, providers take turns, and the floor is what the bytes and FLOPs cost at the
bandwidth and speed that were measured in the same run.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.timing import batch, interleave
from grasp.bench.workloads import (
    OPS,
    backends,
    make_problem,
    rotations,
    wrong,
)
from grasp_kernels import roofline
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.roofline import Card
from grasp_kernels.shapes import Shape, format_shape, parse_shape

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Llama-2-7B's q/k/v/o and gate/up, SmolLM2-135M's gate/up, with a tenth of the parameters kept.
DEFAULT_SHAPES = ("4096x4096r204", "4096x11008r298", "576x1536r41")
BASELINES = ("unfused", "dense")


class Case(NamedTuple):
    """One op at one shape; what its providers are compared at."""

    op: str
    shape: Shape
    rows: int
    dtype: torch.dtype


@dataclass(frozen=True)
class Result:
    """One provider's time in one case, one line of the output."""

    op: str
    provider: str
    shape: str  # KxNrR of each linear
    rows: int
    dtype: str
    median_us: float
    spread: float  # distance between the quartiles, fraction of the median
    floor_us: float | None  # of this provider; launches excluded
    share_of_floor: float | None  # floor over median
    speedup_over_unfused: float
    speedup_over_dense: float
    repetitions: int
    calls_per_repetition: int
    rotated_copies: int
    conditions: Conditions


@dataclass(frozen=True)
class NotMeasured:
    """What was left out, and why; also a line of the output."""

    op: str
    provider: str
    shape: str
    rows: int
    dtype: str
    not_measured: str
    wrong: bool  # the backend ran, and its result was not right


def floor_seconds(case: Case, provider: str, card: Card) -> float | None:
    """What ``provider`` takes at least on ``card``; ``None`` for the dense gradient, whose cost no one would pay."""
    op, itemsize = OPS[case.op], case.dtype.itemsize
    if provider != "dense":
        return roofline.floor(card, *op.cost(case.rows, case.shape, itemsize))
    if case.op == "singular_value_grad":
        return None
    costs = [roofline.dense_linear(case.rows, N, K, itemsize=itemsize) for K, N, _ in case.shape]
    return roofline.floor(card, *itertools.chain(*costs))


@torch.inference_mode()
def measure(
    case: Case, device: torch.device, card: Card, *, only: Sequence[str], rotate_bytes: int, repetitions: int
) -> Iterator[Result | NotMeasured]:
    """Check and time one case: its backends, or ``only`` those, and the baselines."""
    problem = make_problem(case.op, case.shape, case.rows, case.dtype, device)
    runs, reasons = backends(case.op, case.shape, problem)
    labels = (format_shape(case.shape), case.rows, _name(case.dtype))
    for name, reason in reasons.items():
        if not only or name in only:
            yield NotMeasured(case.op, name, *labels, not_measured=reason, wrong=False)
    checked = {name: run for name, run in runs.items() if not only or name in only}
    for name, complaint in [(name, wrong(case.op, problem, run)) for name, run in checked.items()]:
        if complaint is not None:
            del checked[name]
            yield NotMeasured(case.op, name, *labels, not_measured=complaint, wrong=True)

    timed = {**checked, "unfused": OPS[case.op].unfused, "dense": OPS[case.op].dense}
    rotation = rotations(case.op, problem, rotate_bytes)
    sources = {name: rotation["dense" if name == "dense" else "low-rank"] for name in timed}
    batches = {name: batch(device, run, sources[name]) for name, run in timed.items()}
    samples = interleave(batches, repetitions)
    now = conditions(card, device)
    for name, sample in samples.items():
        floor = floor_seconds(case, name, card)
        yield Result(
            case.op,
            name,
            *labels,
            median_us=sample.median * 1e6,
            spread=sample.spread,
            floor_us=None if floor is None else floor * 1e6,
            share_of_floor=None if floor is None else floor / sample.median,
            speedup_over_unfused=sample.speedup_over(samples["unfused"]),
            speedup_over_dense=sample.speedup_over(samples["dense"]),
            repetitions=repetitions,
            calls_per_repetition=batches[name].calls,
            rotated_copies=len(sources[name].copies),
            conditions=now,
        )


def cases(
    ops: Sequence[str], shapes: Sequence[str], rows: Sequence[int], dtypes: Sequence[str]
) -> Iterator[Case | NotMeasured]:
    """Every op at every shape, number of rows and dtype."""
    for op, text, M, dtype in itertools.product(ops, shapes, rows, dtypes):
        shape = OPS[op].fit(parse_shape(text))
        if shape is None:
            yield NotMeasured(op, "*", text, M, dtype, not_measured="the op takes no such shape", wrong=False)
        else:
            yield Case(op, shape, M, DTYPES[dtype])


def result_table(results: Sequence[Result]) -> Table:
    """The providers of one case."""
    first = results[0]
    table = Table(title=f"{first.op} {first.shape}, M = {first.rows}, {first.dtype}", title_justify="left")
    table.add_column("provider", min_width=10)
    for heading in ("median µs", "spread", "floor µs", "of floor", "× unfused", "× dense"):
        table.add_column(heading, justify="right", no_wrap=True)
    for result in results:
        table.add_row(
            result.provider,
            f"{result.median_us:.1f}",
            f"{result.spread:.0%}",
            "" if result.floor_us is None else f"{result.floor_us:.1f}",
            "" if result.share_of_floor is None else f"{result.share_of_floor:.0%}",
            f"{result.speedup_over_unfused:.2f}",
            f"{result.speedup_over_dense:.2f}",
        )
    return table


def left_out_lines(left_out: Sequence[NotMeasured]) -> Iterator[str]:
    """What was not measured, each reason once."""
    by_reason: dict[tuple[bool, str, str, str], list[NotMeasured]] = {}
    for line in left_out:
        by_reason.setdefault((line.wrong, line.provider, line.op, line.not_measured), []).append(line)
    for (is_wrong, provider, op, reason), lines in by_reason.items():
        places = "; ".join(dict.fromkeys(f"{line.shape}, M = {line.rows}, {line.dtype}" for line in lines))
        yield f"{'WRONG' if is_wrong else 'Not measured'}: {provider} {op} at {places}: {reason}"


def _known(names: Sequence[str], known: Sequence[str], what: str) -> Sequence[str]:
    for name in names:
        if name not in known:
            raise typer.BadParameter(f"unknown {what} {name!r}; expected one of {', '.join(known)}")
    return names


def _append(output: Path | None, lines: Sequence[Result | NotMeasured]) -> None:
    if output is not None:
        with output.open("a") as file:
            file.writelines(json.dumps(asdict(line)) + "\n" for line in lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _header(card: Card, dtype: str, device: torch.device, threads: int) -> str:
    where = f"{card.name}, threads: {threads}" if device.type == "cpu" else card.name
    return f"{where}: reads {card.bandwidth / 1e9:.1f} GB/s, multiplies {card.flops / 1e9:.0f} GFLOP/s in {dtype}"


def _device(name: str) -> torch.device:
    if name not in ("cpu", "cuda"):
        raise typer.BadParameter(f"unknown device {name!r}; expected cpu or cuda")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("there is no CUDA GPU here; use --device cpu")
    return torch.device(name)


def main(
    op: Annotated[list[str] | None, typer.Option(help=f"One of {', '.join(OPS)}; all of them if left out.")] = None,
    shape: Annotated[
        list[str] | None, typer.Option(help="KxNrR of a linear; several that share their input joined by '+'.")
    ] = None,
    rows: Annotated[list[int] | None, typer.Option(min=1, help="Tokens; 1 and 16 if left out.")] = None,
    dtype: Annotated[list[str] | None, typer.Option(help=f"Of {', '.join(DTYPES)}; float32 and bfloat16.")] = None,
    backend: Annotated[list[str] | None, typer.Option(help="Only these of the dispatch table.")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="CPU threads; PyTorch's choice if left out.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cuda" if torch.cuda.is_available() else "cpu",
    rotate_mb: Annotated[
        int, typer.Option(min=0, help="MB of distinct weights that calls rotate through; more than any cache holds.")
    ] = 1024,
    repetitions: Annotated[int, typer.Option(min=1, help="Times that every provider gets its turn.")] = 20,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time every op on every backend against one dense linear and two unfused ones.

    Example: python -m grasp.bench.ops --op lowrank_linear --shape 4096x4096r204 --rows 1 --threads 1 -o ops.jsonl
    """
    where = _device(device)
    ops = _known(op or list(OPS), list(OPS), "op")
    only = _known(backend or [], [row.name for row in BACKENDS], "backend")
    dtypes = _known(dtype or ["float32", "bfloat16"], list(DTYPES), "dtype")
    try:
        todo = list(cases(ops, shape or DEFAULT_SHAPES, rows or [1, 16], dtypes))
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    measurable = [case for case in todo if isinstance(case, Case)]
    left_out = [case for case in todo if isinstance(case, NotMeasured)]
    _append(output, left_out)
    console = Console()
    for count in (threads or [torch.get_num_threads()]) if where.type == "cpu" else [1]:
        torch.set_num_threads(count)
        cards = {name: measure_card(where, DTYPES[name]) for name in dtypes}
        for name, card in cards.items():
            console.print(_header(card, name, where, count), highlight=False)
        for case in track(measurable, "timing", console=Console(stderr=True)):
            card = cards[_name(case.dtype)]
            lines = list(measure(case, where, card, only=only, rotate_bytes=rotate_mb << 20, repetitions=repetitions))
            left_out += [line for line in lines if isinstance(line, NotMeasured)]
            console.print(result_table([line for line in lines if isinstance(line, Result)]))
            _append(output, lines)
    for text in left_out_lines(left_out):
        console.print(text, highlight=False)
    raise typer.Exit(int(any(line.wrong for line in left_out)))


if __name__ == "__main__":
    typer.run(main)
