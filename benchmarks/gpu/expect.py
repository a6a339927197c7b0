"""Predict the time of each low-rank call on a GPU from its launches, its binaries and a few assumed rates.

``python -m benchmarks.gpu.expect`` needs no GPU. It prints one row per shape and number of rows, as configured by
``grasp_kernels.launch_configs``. With ``--measured``, times of ``benchmarks.gpu.check`` stand beside the predictions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import triton
import typer

from benchmarks.gpu.aot_cases import CARDS, copied_ahead, requested
from benchmarks.gpu.check import HIGH_RANK, LINEARS, layer
from benchmarks.gpu.check_report import read_report
from benchmarks.gpu.check_runner import read_lines
from benchmarks.gpu.sass import compile_source, specialize
from grasp.bench.conditions import commit
from grasp_kernels import pack_factors, roofline
from grasp_kernels.launch_configs import choose
from grasp_kernels.reference import Factors
from grasp_kernels.roofline import Card, Cost
from grasp_kernels.shapes import GroupShape, format_shape, parse_shape
from grasp_kernels.triton import lowrank_linear
from grasp_kernels.triton.launch import Gpu, Launch

ROWS = (1, 4, 16, 64, 256, 2048, 8192)
LAYER_ROWS = (1, 4, 16, 64)
CASES = ("lowrank_linear", "lowrank_linear_grouped", "layer")  # of the check
REGISTERS, THREADS, PROGRAMS = 65536, 2048, 32  # most of one processor
RESERVED = 1024  # bytes of shared memory that each program takes beside its own
ITEMSIZE, WIDE = 2, 4  # bytes of bf16, of fp32


@dataclass(frozen=True)
class Rates:
    """What is assumed about a GPU. Nothing of it was measured here; `benchmarks.gpu.check` measures most of it."""

    name: str
    memory: float  # bytes/s of main memory
    cache: float  # bytes/s of the second-level cache, all processors together
    port: float  # bytes/s into one processor
    flops: float  # FLOP/s of a large bf16 product
    latency: float  # s from a load to its data under load
    hit: float  # the same, for data in the second-level cache
    shared: int  # bytes of one processor
    gap: float  # s between two launches in a graph
    ramp: float  # s until all programs of a launch load at full rate
    dependent: float  # s from the end of a launch to the start of the dependent one, which was resident before
    reduction: float  # s that the last program of a split sum takes for the others
    products: float  # share of the rates that the vendor's matrix products reach


# Sources: data sheets (memory: 85 to 90 % of the peak; one processor: 85 % of 64 bytes per clock); latency, cache and
# start-up are estimates.
RATES = {
    80: Rates("A100", 1.75e12, 4.0e12, 75e9, 250e12, 0.7e-6, 0.3e-6, 164 << 10, 1.5e-6, 1e-6, math.inf, 2e-6, 0.85),
    90: Rates("H100", 3.0e12, 5.5e12, 95e9, 798e12, 0.8e-6, 0.3e-6, 228 << 10, 1.3e-6, 1e-6, 0.7e-6, 2e-6, 0.85),
    100: Rates("B200", 7.0e12, 10e12, 100e9, 1800e12, 0.9e-6, 0.35e-6, 228 << 10, 1.3e-6, 1e-6, 0.7e-6, 2e-6, 0.85),
}


class Resources(NamedTuple):
    """What a compiled program takes."""

    registers: int  # per thread
    shared: int  # bytes
    ahead: int  # bytes that its loops copy ahead
    requested: int = 0  # bytes of h that are requested before the first of them is used


ResourcesOf = Callable[[Launch, Gpu], Resources]
Times = Mapping[tuple[str, int], float]  # measured µs by shapes and rows
ASSUMED = (
    *("memory, bytes/s", "L2, bytes/s", "one SM, bytes/s", "FLOP/s", "latency, s", "L2 latency, s", "shared, bytes"),
    *("gap, s", "ramp, s", "dependent start, s", "reduction, s", "share of two products"),
)
HEADINGS = (
    *("shape", "M", "path", "CTAs", "waves", "KB in flight per SM", "MB through L2"),
    *("expected µs", "floor µs", "share", "two products µs", "pivoted µs", "its floor µs", "measured µs"),
)
LAYER_HEADINGS = (
    *("M", "expected µs", "chain µs", "floor µs", "share", "14 products µs", "ratio"),
    *("pivoted µs", "its floor µs", "measured µs"),
)


class Prediction(NamedTuple):
    """The arithmetic of one launch."""

    programs: int
    waves: float
    in_flight: float  # bytes per processor
    cache_bytes: int  # through the second-level cache
    seconds: float  # from the end of the launch before, if that wrote nothing ahead
    fetched: float  # seconds in which memory delivers the factor
    chained: float  # seconds from the end of the launch before, which ran while the factor was fetched


def resident_programs(resources: Resources, warps: int, rates: Rates) -> int:
    """Programs that fit one processor: registers are given to warps in steps of 256, 8 per thread."""
    registers = -(-resources.registers // 8) * 8 * 32 * warps
    shared = resources.shared + RESERVED
    return max(1, min(REGISTERS // registers, rates.shared // shared, THREADS // (32 * warps), PROGRAMS))


def predict(
    cost: Cost,
    cache_bytes: int,
    programs: int,
    tile_bytes: int,
    launch: Launch,
    resources: Resources,
    gpu: Gpu,
    *,
    hidden_bytes: int = 0,
    held_bytes: int = 0,
    late: float = 0.0,
) -> Prediction:
    """The time of a launch: its start, then the slowest of memory, cache, arithmetic and waiting for loads.

    Args:
        cost: bytes of main memory and FLOPs.
        cache_bytes: bytes through the second-level cache.
        programs: of the grid.
        tile_bytes: bytes that a program requests before it waits, apart from h and the copies of its loops.
        launch: for its warps, and whether it is dependent.
        resources: of its binary.
        gpu: as in ``aot_cases.CARDS``.
        hidden_bytes: of ``cache_bytes``: h, which is in the cache and requested beside the factor.
        held_bytes: of ``cache_bytes``, in registers when a dependent launch has waited.
        late: share of the bytes of main memory that a dependent launch requests after its wait.
    """
    rates = RATES[gpu.capability]
    resident = resident_programs(resources, launch.options["num_warps"], rates)
    waves = programs / (gpu.processors * resident)
    each = (cache_bytes - hidden_bytes) / programs
    in_flight = min(each, tile_bytes + resources.ahead)
    trips = max(1.0, each / in_flight)
    hits = hidden_bytes / programs / resources.requested if hidden_bytes and resources.requested else 1.0
    computing, turns = cost.flops / rates.flops, math.ceil(waves)

    def moving(traffic: float) -> float:
        """Seconds of the cache, or of the processor that has the most programs."""
        return max(traffic / rates.cache, -(-programs // gpu.processors) * traffic / programs / rates.port)

    waiting = turns * max(trips * rates.latency, hits * rates.hit)
    work = max(cost.bytes / rates.memory, moving(cache_bytes), computing, waiting)
    dependent = launch.arguments["DEPENDENT"] and launch.options.get("launch_pdl", False)
    start = rates.dependent if dependent else rates.gap + rates.ramp
    held = held_bytes / max(1.0, waves)  # the programs of later waves have not started
    waiting = turns * max(1.0, hits, trips if late or not held_bytes else 0.0) * rates.hit
    late = 1 - (1 - late) / max(1.0, waves)
    rest = max(moving(cache_bytes - held), computing, waiting, late * cost.bytes / rates.memory)
    return Prediction(
        programs,
        waves,
        in_flight * min(resident, programs / gpu.processors),
        cache_bytes,
        start + work,
        cost.bytes / rates.memory,
        rates.dependent + rest,
    )


def pair(first: Prediction, second: Prediction, rates: Rates) -> float:
    """Seconds of shrink and expand. A dependent expand requests U while the shrink works, after the shrink's Vh."""
    if math.isinf(rates.dependent):
        return first.seconds + second.seconds
    memory = rates.gap + rates.ramp + first.fetched + second.fetched
    return max(memory, first.seconds + second.chained)


def chain(parts: Sequence[Prediction]) -> float:
    """Seconds of dependent launches, over and over: while each works, the factor of the next is fetched.

    The launches follow one another at once, as if nothing ran between the calls.
    """
    following = [*parts[1:], *parts[:1]]
    return sum(max(part.chained, after.fetched) for part, after in zip(parts, following, strict=True))


def shrink(launch: Launch, shape: GroupShape, M: int, resources: Resources, gpu: Gpu) -> Prediction:
    """The launch that computes h: each program reads a tile of Vh and the rows of x that belong to it.

    ``seconds`` are those after a kernel that is not of a low-rank call.
    """
    launch = launch._replace(options={**launch.options, "launch_pdl": False})
    arguments, K, R = launch.arguments, shape[0].K, sum(linear.R for linear in shape)
    tiles, splits, row_tiles = launch.grid
    factors, partial = R * K * ITEMSIZE, splits * M * R * WIDE
    cost = Cost(factors + M * K * ITEMSIZE, 2 * M * R * K)
    tile = arguments["BLOCK_R"] * arguments["BLOCK_K"] * ITEMSIZE if not resources.ahead else 0
    traffic = row_tiles * factors + tiles * M * K * ITEMSIZE + partial
    if not arguments["REDUCE"]:
        return predict(cost, traffic, math.prod(launch.grid), tile, launch, resources, gpu)
    part = predict(cost, traffic + partial + M * R * ITEMSIZE, math.prod(launch.grid), tile, launch, resources, gpu)
    rates = RATES[gpu.capability]
    sums = splits * arguments["BLOCK_M"] * arguments["BLOCK_R"] * WIDE  # bytes that one program adds up
    tail = rates.reduction + sums / rates.port
    return part._replace(seconds=part.seconds + tail, chained=part.chained + tail)


def expand(launch: Launch, shape: GroupShape, M: int, resources: Resources, gpu: Gpu) -> Prediction:
    """The launch that computes y: each program reads a tile of U, and h of its member and rows, or all partial sums.

    U of pivoted factors has N - R rows. Without tiles of U ahead, the launch follows a product that stores h in bf16.
    """
    arguments = launch.arguments
    pivots = arguments.get("pivots") or [0] * len(shape)
    factors = sum((N - P) * R for (_, N, R), P in zip(shape, pivots, strict=True)) * ITEMSIZE
    y = M * sum(linear.N for linear in shape) * ITEMSIZE
    element = ITEMSIZE if arguments["REDUCE"] or not arguments["TILES"] else arguments["SPLITS"] * WIDE
    tiles = [-(-(N - P) // arguments["BLOCK_N"]) for (_, N, _), P in zip(shape, pivots, strict=True)]  # with rows of U
    h = sum((count * R + P) * M * element for count, (_, _, R), P in zip(tiles, shape, pivots, strict=True))
    tile = arguments["BLOCK_N"] * min(arguments["TILES"] * arguments["BLOCK_R"], shape[0].R) * ITEMSIZE
    traffic = launch.grid[1] * factors + h + y
    hidden = h if arguments["TILES"] else 0  # a matrix product's h is an operand that loops copy ahead
    late = 1 - min(1.0, arguments["TILES"] * arguments["BLOCK_R"] / max(linear.R for linear in shape))
    cost = Cost(factors + y, M * factors)
    return predict(
        cost,
        *(traffic, math.prod(launch.grid), tile, launch, resources, gpu),
        hidden_bytes=hidden,
        held_bytes=int(factors * (1 - late)),
        late=late,
    )


def product(M: int, N: int, K: int, rates: Rates) -> float:
    """Seconds of one matrix product, (M, K) by (K, N), with its launch; at least one load must return."""
    card = Card(rates.name, rates.flops, rates.memory)
    work = roofline.floor(card, *roofline.dense_linear(M, N, K)) / rates.products
    return rates.gap + rates.ramp + max(work, rates.latency)


def products(shape: GroupShape, M: int, rates: Rates, *, stacked: bool = False) -> float:
    """Seconds of two matrix products per linear, each a launch; one product for all Vh if they are ``stacked``."""
    ranks = [sum(linear.R for linear in shape)] if stacked else [linear.R for linear in shape]
    parts = [*((R, shape[0].K) for R in ranks), *((N, R) for _, N, R in shape)]
    return sum(product(M, *part, rates) for part in parts)


class Row(NamedTuple):
    """One call; times in µs."""

    shape: str
    M: int
    path: str
    parts: list[Prediction]  # of shrink and expand; none for matrix products
    expected: float
    floor: float  # launches excluded
    products: float  # two matrix products per linear
    pivoted: float  # expected with pivoted factors of the same ranks
    pivoted_floor: float
    measured: float | None


def call(shape: GroupShape, M: int, gpu: Gpu, resources: ResourcesOf, times: Times | None = None) -> Row:
    """The arithmetic of ``lowrank_linear`` or ``lowrank_linear_grouped``, in bf16, on packed and on pivoted factors."""
    rates = RATES[gpu.capability]
    card = Card(rates.name, rates.flops, rates.memory)
    (cost,) = roofline.lowrank_linear_grouped(M, shape[0].K, [(N, R) for _, N, R in shape])
    path, parts, expected = _expected(shape, _factors(shape), M, gpu, resources)
    _, _, pivoted = _expected(shape, _factors(shape, pivoted=True), M, gpu, resources)
    pivoted_cost = roofline.pivoted(cost, M, [R for _, _, R in shape])
    label = format_shape(shape)
    return Row(
        shape=label,
        M=M,
        path=path,
        parts=parts,
        expected=1e6 * expected,
        floor=1e6 * roofline.floor(card, cost),
        products=1e6 * products(shape, M, rates),
        pivoted=1e6 * pivoted,
        pivoted_floor=1e6 * roofline.floor(card, pivoted_cost),
        measured=None if times is None else times.get((label, M)),
    )


def _expected(
    shape: GroupShape, groups: Sequence[Factors], M: int, gpu: Gpu, resources: ResourcesOf
) -> tuple[str, list[Prediction], float]:
    """The path of a call, its two launches if it is no matrix products, and its seconds."""
    rates, x, ys = RATES[gpu.capability], _empty(M, shape[0].K), [_empty(M, N) for _, N, _ in shape]
    packed = tuple(linear._replace(R=group.U.shape[1]) for linear, group in zip(shape, groups, strict=True))
    config = choose("lowrank_linear", gpu, lowrank_linear.launch_key(x, groups))
    if config.path != "gemms":
        launches = lowrank_linear.plan(x, groups, ys, config, gpu)
        first, second = (
            phase(launch, packed, M, resources(launch, gpu), gpu)
            for phase, launch in zip((shrink, expand), launches, strict=True)
        )
        return config.path, [first, second], pair(first, second, rates)
    if groups[0].order is None:
        return config.path, [], products(packed, M, rates, stacked=True)
    seconds = product(M, sum(linear.R for linear in packed), shape[0].K, rates)
    for linear, group, y in zip(packed, groups, ys, strict=True):
        launch = lowrank_linear.pivoted_launch(_empty(M, linear.R), group, y, gpu)
        seconds += expand(launch, (linear,), M, resources(launch, gpu), gpu).seconds
    return config.path, [], seconds


class Compiled:
    """The resources of binaries, each compiled once."""

    def __init__(self) -> None:
        self._known: dict[str, Resources] = {}

    def __call__(self, launch: Launch, gpu: Gpu) -> Resources:
        """The resources of a launch's binary for a GPU."""
        source = specialize(gpu.capability, launch.kernel, launch.arguments, launch.options)
        if source.key not in self._known:
            binary = compile_source(source)
            self._known[source.key] = Resources(
                binary.registers, binary.shared, copied_ahead(launch, binary), requested(launch, binary)
            )
        return self._known[source.key]


def _empty(*shape: int) -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16)


@functools.cache
def _factors(shape: GroupShape, *, pivoted: bool = False) -> list[Factors]:
    """Packed factors; the U of pivoted ones lack R rows."""
    packed = pack_factors([Factors(_empty(N, R), None, _empty(R, K)) for K, N, R in shape])
    if not pivoted:
        return packed
    return [
        group._replace(U=group.U[R:].contiguous(), order=torch.empty(N, dtype=torch.int32))
        for group, (_, N, R) in zip(packed, shape, strict=True)
    ]


def page(architectures: Sequence[int], resources: ResourcesOf, times: Times | None = None) -> Iterator[str]:
    """Everything that is printed, in Markdown; ``architectures`` are keys of ``RATES``."""
    yield "# Expected times of the low-rank calls on GPUs"
    yield f"Nothing here is measured, except in the last column. Commit {commit()}, Triton {triton.__version__}, bf16."
    yield from _markdown(("assumed", *ASSUMED), [_rates(RATES[number]) for number in architectures])
    for architecture in architectures:
        gpu = CARDS[architecture]
        linears = [parse_shape(text) for text in (*LINEARS, HIGH_RANK)]
        shapes = dict.fromkeys([*linears, *(shape for _, shape in layer(1).parts)])
        rows = [call(shape, M, gpu, resources, times) for shape in shapes for M in ROWS]
        yield f"## {RATES[architecture].name}, sm_{architecture}, {gpu.processors} SMs"
        yield from _markdown(HEADINGS, map(_row, rows))
        yield "A layer of Llama-2-7B, seven linears in four calls:"
        yield from _markdown(LAYER_HEADINGS, [_layer(rows, M, times) for M in LAYER_ROWS])


def _layer(rows: Sequence[Row], M: int, times: Times | None) -> list[str]:
    parts = [next(row for row in rows if (row.shape, row.M) == (shape, M)) for shape in layer(M).label.split()]
    pairs = all(part.parts for part in parts)  # a chain has no matrix products
    chained = chain([launch for part in parts for launch in part.parts]) * 1e6 if pairs else math.inf
    expected, floor, two = (sum(getattr(part, name) for part in parts) for name in ("expected", "floor", "products"))
    found = (times or {}).get((layer(M).label, M))
    ratios = (f"{floor / expected:.2f}", f"{two:.1f}", f"{two / expected:.2f}")
    times_and_floor = (f"{time:.1f}" if math.isfinite(time) else "" for time in (expected, chained, floor))
    pivoted = (f"{sum(getattr(part, name) for part in parts):.1f}" for name in ("pivoted", "pivoted_floor"))
    return [str(M), *times_and_floor, *ratios, *pivoted, "" if found is None else f"{found:.1f}"]


def _row(row: Row) -> list[str]:
    parts = row.parts
    columns = [
        " + ".join(str(part.programs) for part in parts),
        " + ".join(f"{part.waves:.2f}" for part in parts),
        " + ".join(f"{part.in_flight / 1024:.0f}" for part in parts),
        " + ".join(f"{part.cache_bytes / 1e6:.1f}" for part in parts),
    ]
    numbers = [f"{row.expected:.1f}", f"{row.floor:.2f}", f"{row.floor / row.expected:.2f}", f"{row.products:.1f}"]
    numbers += [f"{row.pivoted:.1f}", f"{row.pivoted_floor:.2f}"]
    return [row.shape, str(row.M), row.path, *columns, *numbers, "" if row.measured is None else f"{row.measured:.1f}"]


def _rates(rates: Rates) -> list[str]:
    name, *numbers = astuple(rates)
    return [name, *(f"{number:.3g}" for number in numbers)]


def _markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    yield "\n".join("| " + " | ".join(row) + " |" for row in (headings, ["---"] * len(headings), *rows))


def main(
    architecture: Annotated[list[int] | None, typer.Option(help="80, 90 or 100. Default: all.")] = None,
    measured: Annotated[Path | None, typer.Option(help="A file of benchmarks.gpu.check.")] = None,
) -> None:
    """Print what the configurations are expected to reach."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    times = None
    if measured is not None:
        results = read_report(read_lines(measured)).results
        lines = [line for line in results if line.provider == "triton" and line.case in CASES]
        times = {(line.shapes, line.rows): line.median_us for line in lines}
    typer.echo("\n\n".join(page(architecture or list(RATES), Compiled(), times)))


if __name__ == "__main__":
    typer.run(main)
