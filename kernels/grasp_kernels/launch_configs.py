"""The launch configuration of a call: measured ones, in one JSON file per GPU and kernel, else a rule of thumb.

A file is used only with the Triton version and kernel source that it was measured with; ``status`` says why it is not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .triton.launch import Gpu
from .triton.prepared import PREPARED

CONFIGS = Path(__file__).parent / "configs"
_LINEAR = tuple(
    f"triton/{name}.py" for name in ("lowrank_linear", "lowrank_linear_kernels", "shrink", "expand", "tiles")
)
SOURCES = {
    "lowrank_linear": _LINEAR,
    "lowrank_glu": ("triton/lowrank_glu.py", *_LINEAR),
    "singular_value_grad": (
        "triton/singular_value_grad.py",
        "triton/singular_value_grad_kernels.py",
        "triton/tiles.py",
    ),
}
PATHS = ("pair", "fused", "gemms")
PAIR_ROWS, FUSED_ROWS, FUSED_RANK = 512, 64, 256  # most rows and rank of a path; above the rank, registers spill
UNTUNED_PAIR_ROWS = 64  # above, matrix products, unless a measurement on the GPU says otherwise
UNTUNED_PAIR_SIZE = 1 << 16  # rows * rank, likewise: above, the L2 cache takes longer than two matrix products
UNREDUCED_ROWS, UNREDUCED_SPLITS = 16, 8  # most in a 16-bit dot whose readers add up the partial sums: registers
FULL_PRECISION_PAIR_ROWS = 16
ROW_BLOCK = 64
# Estimates: µs from a load to its data, from memory under load or from the L2 cache; µs that the last program of a tile
# needs before it adds up partial sums; µs to start a launch, also one that waits for the launch before it.
LATENCY, HIT, REDUCE_TAIL, START, DEPENDENT_START = 0.8, 0.3, 2.0, 2.3, 0.7
# Likewise, by the least compute capability: bytes per µs and processor of memory and of the L2 cache, if all of them
# read, and most bytes per µs into one.
SPEEDS = {0: (16_200, 37_000, 75_000), 90: (22_700, 42_000, 95_000), 100: (47_300, 67_500, 100_000)}
# Bytes: of a processor's registers; of a thread of an expand for tiles of U, h and y, of 1020, and for anything else.
REGISTER_FILE, REGISTER_BYTES, OVERHEAD = 256 << 10, 576, 256
PIECE = 64  # columns of U, about, that a program loads at once
REQUESTED = 80  # bytes of h that a thread of an expand requests before it uses the first of them
PRODUCT_SHARE = 0.85  # of the rates, that the vendor's matrix products reach
MOST_STAGES = 8
SHARED, SHARED_WIDE = 80 << 10, 160 << 10  # bytes of a shrink's tiles; an expand's programs share the processor
MAX_DOUBLINGS = 2.0  # in any one dimension, between a key and the measured key whose configuration it uses


class LaunchKey(NamedTuple):
    """The properties of a call that its configuration depends on. Sizes of a grouped call are summed."""

    rows: int  # M, rounded up to a power of two
    width: int  # N
    in_features: int  # K
    rank: int  # R
    dtype: str  # "bfloat16", ...
    groups: int  # members of the group
    pivots: int = 0  # outputs that h gives, in pivoted factors

    @classmethod
    def of(
        cls, rows: int, width: int, in_features: int, rank: int, dtype: torch.dtype, groups: int, pivots: int = 0
    ) -> LaunchKey:
        """The key of a call."""
        name = str(dtype).removeprefix("torch.")
        return cls(_power_of_two(rows), width, in_features, rank, name, groups, pivots)


@dataclass(frozen=True)
class Config:
    """A launch configuration. Blocks are elements of a program's tile; the others count warps, stages, splits."""

    path: str  # one of PATHS
    block_m: int  # in both phases; smaller if there are fewer rows
    shrink_block_r: int
    shrink_block_k: int
    splits: int  # programs that compute partial sums of one tile of h
    shrink_warps: int
    reduce: bool  # the last of these programs adds up the partial sums; otherwise every reader does
    expand_block_n: int
    expand_block_r: int
    expand_warps: int
    stages: int  # tiles in shared memory: all but one are being copied while one is used


MATRIX_PRODUCTS = Config(  # the blocks are those of the dual expand that follows in a gated linear unit
    path="gemms",
    block_m=128,
    shrink_block_r=16,
    shrink_block_k=128,
    splits=1,
    shrink_warps=4,
    reduce=False,
    expand_block_n=128,
    expand_block_r=64,
    expand_warps=8,
    stages=3,
)


def pivoted_product(gpu: Gpu) -> Config:
    """The configuration of the expand that follows the matrix product of pivoted factors.

    With 128 x 256 outputs it reads a third less from the L2 cache, but only on sm_90 it then spills no registers.
    """
    hopper = gpu.capability == 90
    return replace(MATRIX_PRODUCTS, expand_block_n=256 if hopper else 128, expand_warps=16 if hopper else 8)


def choose(kernel: str, gpu: Gpu, key: LaunchKey) -> Config:
    """The configuration measured for the nearest key on this GPU, otherwise that of the rule of thumb."""
    return _choose(kernel, gpu, key, CONFIGS)


def for_quantized(gpu: Gpu, key: LaunchKey) -> Config:
    """The configuration of a linear of quantised factors: that of floating ones of the dtype of x, as a pair.

    Its estimate counts two to eight times the bytes of the weights. For many rows the configuration is matrix products
    of dequantised copies, whose cost more rows share. Not measured.
    """
    most = FULL_PRECISION_PAIR_ROWS if key.dtype == "float32" else PAIR_ROWS
    few = key._replace(rows=min(key.rows, UNTUNED_PAIR_ROWS))  # more have no rule of thumb for a pair
    return replace(choose("lowrank_linear", gpu, few), path="pair" if key.rows <= most else "gemms")


def status(kernel: str, gpu: Gpu) -> str:
    """How many measured configurations are used for a GPU, or why none is."""
    return read_entries(kernel, gpu.name, CONFIGS)[1]


def source_stamp(kernel: str) -> str:
    """A hash of the source files of a kernel."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES[kernel])).hexdigest()[:16]


def config_path(kernel: str, card_name: str, directory: Path = CONFIGS) -> Path:
    """The file of the measured configurations of a GPU and kernel."""
    card = card_name.replace(" ", "_").replace("/", "_")
    return directory / f"{kernel},device_name={card}.json"


@functools.cache
def load(kernel: str, card_name: str, directory: Path) -> dict[LaunchKey, Config]:
    """The measured configurations of a GPU; none if its file is not used."""
    entries, _ = read_entries(kernel, card_name, directory)
    return {LaunchKey(**entry["problem"]): Config(**entry["config"]) for entry in entries}


def save(
    kernel: str, card_name: str, measured: dict[LaunchKey, tuple[Config, float]], directory: Path = CONFIGS
) -> Path:
    """Write the file of a GPU; ``measured`` has the configuration and its time in µs for each key."""
    entries: list[dict[str, Any]] = [
        {"problem": key._asdict(), "config": asdict(config), "microseconds": round(microseconds, 3)}
        for key, (config, microseconds) in sorted(measured.items())
    ]
    path = write_entries(kernel, card_name, entries, directory)
    load.cache_clear()
    _choose.cache_clear()
    PREPARED.clear()
    return path


def read_entries(kernel: str, card_name: str, directory: Path) -> tuple[list[dict[str, Any]], str]:
    """The entries of the file of a GPU, none if it is missing or has another stamp; and how many, or why none."""
    path = config_path(kernel, card_name, directory)
    if not path.exists():
        return [], f"no configurations measured on {card_name}; `grasp bench tune` measures them"
    content = json.loads(path.read_text())
    for stamp, expected in stamps(kernel).items():
        if content[stamp] != expected:
            return [], (
                f"{path.name} is ignored: measured with {stamp} {content[stamp]}, expected {expected}; "
                "run `grasp bench tune` again"
            )
    entries: list[dict[str, Any]] = content["entries"]
    return entries, f"{len(entries)} configurations measured on {card_name}"


def write_entries(kernel: str, card_name: str, entries: list[dict[str, Any]], directory: Path) -> Path:
    """Write the file of a GPU. Until the new one is complete, an earlier one stays."""
    path = config_path(kernel, card_name, directory)
    directory.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    content = {"card": card_name, "kernel": kernel, **stamps(kernel), "entries": entries}
    temporary.write_text(json.dumps(content, indent=1))
    return temporary.replace(path)


def stamps(kernel: str) -> dict[str, str]:
    """Versions that must equal those of the measurement, by their names in the file."""
    return {"triton": triton.__version__, "source": source_stamp(kernel)}


@functools.lru_cache(maxsize=4096)
def _choose(kernel: str, gpu: Gpu, key: LaunchKey, directory: Path) -> Config:
    entries = load(kernel, gpu.name, directory)
    usable = [(distance(key, other), other) for other, config in entries.items() if serves(config, key)]
    doublings, nearest = min(usable, default=(math.inf, key))
    return entries[nearest] if doublings < math.inf else rule_of_thumb(kernel, key, gpu)


def distance(key: LaunchKey, other: LaunchKey) -> float:
    """Doublings between two keys; infinite if one must not use the configuration of the other.

    Rows count most: their number decides which kernel is fastest, far more than the shape of the weight.
    """
    if (key.dtype, key.groups, key.pivots > 0) != (other.dtype, other.groups, other.pivots > 0):
        return math.inf
    doublings = [abs(math.log2(max(a, 1) / max(b, 1))) for a, b in zip(key[:4], other[:4], strict=True)]
    if max(doublings) > MAX_DOUBLINGS or (key.rows <= 2) != (other.rows <= 2):
        return math.inf
    return 4 * doublings[0] + sum(doublings[1:])


def serves(config: Config, key: LaunchKey) -> bool:
    """Whether the path of a configuration can run the calls of a key."""
    if config.path == "fused":
        small = key.rows <= FUSED_ROWS and key.rank <= FUSED_RANK * key.groups
        return small and (key.rows <= 2 or key.dtype != "float32")
    return config.path == "gemms" or key.rows <= PAIR_ROWS


def on_path(config: Config, path: str, key: LaunchKey) -> Config:
    """``config`` on another path: the first candidate when that path is measured."""
    if path != "fused":
        return replace(config, path=path)
    if key.rows <= 2:
        return replace(config, path=path, stages=2)  # more stages spill registers at two rows
    # The tile is smaller than that of the pair, because the first tile of U stays in registers across the barrier.
    stages = 2 if key.rows > 16 else 3
    return replace(config, path=path, reduce=config.splits > 1, expand_block_n=16, expand_warps=8, stages=stages)


class Estimate(NamedTuple):
    """µs of a pair, from start to end."""

    alone: float  # after another kernel
    chained: float  # after and before another pair, if its launches are dependent


def estimate(key: LaunchKey, config: Config, gpu: Gpu, members: int) -> Estimate:
    """The time of a pair: its starts, then the slowest of memory, cache and waiting for loads.

    Every program of the shrink reads ``shrink_block_r + rows`` rows of ``K / splits`` elements, and stores
    ``rows * shrink_block_r`` sums in fp32. Every program of the expand reads ``expand_block_n`` rows of U and all of h:
    ``rows * R`` elements, or in fp32 once for each split if nobody reduces them. A dependent expand requests U while
    the shrink works. The outputs that h gives are left out.

    Args:
        key: the call.
        config: of the pair.
        gpu: its processors, and whether launches may start before the launch before them ends.
        members: members of the group whose outputs a program of the expand does not share.
    """
    rows, width, in_features, rank, dtype, _, pivots = key
    width -= pivots
    size, processors = 4 if dtype == "float32" else 2, gpu.processors
    memory, cache, port = _speeds(gpu)
    member_rank, row_block = -(-rank // members), min(rows, ROW_BLOCK)
    row_tiles, span = -(-rows // row_block), -(-in_features // config.splits)

    def moving(programs: int, program_bytes: float) -> float:
        busiest = -(-programs // processors) * program_bytes / port
        return max(programs * program_bytes / (processors * cache), busiest)

    programs = row_tiles * config.splits * -(-rank // config.shrink_block_r)
    sums = row_block * config.shrink_block_r * 4
    traffic = moving(programs, (config.shrink_block_r + row_block) * span * size + sums)
    trips = max(1.0, span / ((config.stages - 1) * config.shrink_block_k))
    tail = REDUCE_TAIL + config.splits * sums / port if config.reduce else 0.0
    vh, u = (count * member_rank * size / (processors * memory) for count in (in_features * members, width))
    programs = row_tiles * max(1, -(-width // config.expand_block_n))  # no row of U is left if all outputs are pivots
    hidden = row_block * member_rank * (size if config.reduce else 4 * config.splits)
    hits = max(1.0, hidden / (REQUESTED * 32 * config.expand_warps)) * HIT
    shrink = max(traffic, vh, trips * LATENCY) + tail
    if not gpu.dependent_launch:
        u_bytes = config.expand_block_n * member_rank * size
        return Estimate(2 * START + shrink + max(moving(programs, u_bytes + hidden), u, LATENCY, hits), math.inf)
    bytes_of_y = max(16, row_block) * config.expand_block_n * 4
    column = ((1 + (pivots > 0)) * max(16, row_block) + config.expand_block_n) * size  # of h, also as outputs, and U
    ahead = max(1, (REGISTER_BYTES * 32 * config.expand_warps - bytes_of_y) // (column * PIECE)) * PIECE
    held = bytes_of_y + column * min(ahead, member_rank) + OVERHEAD * 32 * config.expand_warps
    started = processors * max(1, REGISTER_FILE // held)  # before the others end
    late = u * (1 - min(1.0, ahead / member_rank) * min(1.0, started / programs))
    loops = max(0, member_rank - ahead) / PIECE * HIT * (rows > 2)  # with a dot, each step waits for its part of h
    expand = DEPENDENT_START + max(moving(programs, hidden), hits, loops, late)
    alone = START + max(vh + u, shrink + expand)
    following = DEPENDENT_START + max(traffic, trips * HIT) + tail
    return Estimate(alone, max(following, u) + max(expand, vh))


def products_estimate(key: LaunchKey, gpu: Gpu) -> float:
    """µs of the vendor's matrix products: one for all Vh, one for each U, or for pivoted factors an expand for each."""
    rows, width, in_features, rank, dtype, groups, pivots = key
    size, member_rank, member_width = 4 if dtype == "float32" else 2, -(-rank // groups), (width - pivots) // groups
    memory, cache, port = _speeds(gpu)

    def product(outputs: int, inputs: int) -> float:
        moved = size * (outputs * inputs + rows * (outputs + inputs))
        return START + max(moved / (gpu.processors * memory * PRODUCT_SHARE), LATENCY)

    if not pivots:
        return product(rank, in_features) + groups * product(member_width, member_rank)
    config = pivoted_product(gpu)
    row_block = min(config.block_m, max(16, rows))
    programs = -(-rows // row_block) * -(-member_width // config.expand_block_n)
    moved = (row_block + config.expand_block_n) * member_rank * size  # by each
    busiest = -(-programs // gpu.processors) * moved / port
    whole = max(programs * moved / cache, size * (member_width * member_rank + rows * width // groups) / memory)
    trips = member_rank / ((config.stages - 1) * config.expand_block_r)
    return product(rank, in_features) + groups * (START + max(busiest, whole / gpu.processors, trips * LATENCY))


def _speeds(gpu: Gpu) -> tuple[int, int, int]:
    return SPEEDS[max(capability for capability in SPEEDS if capability <= gpu.capability)]


def rule_of_thumb(kernel: str, key: LaunchKey, gpu: Gpu) -> Config:
    """Not measured: the blocks of the least ``estimate`` whose tiles fit, or matrix products if these take less."""
    rows, width, _, rank, dtype, groups, pivots = key
    full_precision, gated = dtype == "float32", kernel == "lowrank_glu"  # fp32: scalar arithmetic for any rows
    most_rows = FULL_PRECISION_PAIR_ROWS if full_precision else UNTUNED_PAIR_ROWS
    large = rows * rank > UNTUNED_PAIR_SIZE * groups and (gated or not pivots)
    if rows > most_rows or large:
        return replace(MATRIX_PRODUCTS, expand_block_n=128 if gpu.warpgroup_dots else 64)
    members = 1 if gated else groups  # a program of the dual expand computes with both members
    outputs = key._replace(width=width // groups, pivots=pivots // groups) if gated else key

    def time(config: Config) -> tuple[float, ...]:
        this = estimate(outputs, config, gpu, members)
        both = this.alone + (this.chained if gpu.dependent_launch else 0.0)
        size = (config.shrink_block_r, config.stages, config.splits, config.expand_block_n, config.expand_warps)
        return both, this.alone, *size  # of equal times the smallest

    config = min(_candidates(key, gpu, gated=gated), key=time)
    slower = not (gated or full_precision) and time(config)[1] > products_estimate(key, gpu)
    return replace(config, path="gemms") if slower else config  # its blocks are where a measurement of the pair starts


def _candidates(key: LaunchKey, gpu: Gpu, *, gated: bool) -> Iterator[Config]:
    """Pairs whose tiles fit the registers and the shared memory."""
    rows, width, in_features, rank, dtype, groups, _ = key
    full_precision, scalar = dtype == "float32", rows <= 2
    many, size = rows > 16 and not full_precision, 4 if full_precision else 2
    few = rows <= UNREDUCED_ROWS and not full_precision and not gated
    block_k = min(128 if many else 256, max(16, _power_of_two(in_features))) >> full_precision
    widest = max(16, _power_of_two(width // groups))
    expands = [(32, 4)]  # outputs and warps
    if not (scalar or gated or full_precision):
        expands += [(64, 4), (64, 8), (128, 8)] if many else [(64, 4), (128, 8)]
    for block_r in (16, 32, 64) if many else (16,) if scalar or full_precision else (16, 32):
        tile = (block_r + (0 if scalar else min(ROW_BLOCK, max(16, rows)))) * block_k * size
        for splits in (1, 2, 3, 4, 6, 8, 16):
            if splits > max(1, in_features // (2 * block_k)) or (few and splits > UNREDUCED_SPLITS):
                break
            deep = -(-in_features // (splits * block_k)) + 1
            fitting = (SHARED_WIDE if gpu.warpgroup_dots else SHARED) // tile
            stages = max(4 if scalar else 3, min(MOST_STAGES, deep, fitting))
            reduce = splits > 1 and not (scalar or few)
            for outputs, warps in expands:
                block_n = min(outputs, widest)
                piece = 1024 * warps // block_n if rows <= 16 else 64  # columns of U per step
                piece >>= gated + (0 if not full_precision else 1 if scalar else 2)
                yield Config(
                    path="pair",
                    block_m=ROW_BLOCK,
                    shrink_block_r=block_r,
                    shrink_block_k=block_k,
                    splits=splits,
                    shrink_warps=4,
                    reduce=reduce,
                    expand_block_n=block_n,
                    expand_block_r=max(16, min(piece, _power_of_two(-(-rank // groups)))),
                    expand_warps=warps,
                    stages=stages,
                )


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
