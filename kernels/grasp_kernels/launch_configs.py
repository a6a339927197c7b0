"""The launch configuration of a call: measured ones, in one JSON file per GPU and kernel, else a rule of thumb.

A file is used only with the Triton version and kernel source that it was measured with; ``status`` says why it is not.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from grasp_kernels.triton.launch import Gpu
from grasp_kernels.triton.prepared import PREPARED

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
# Estimates for an H100: bytes per µs that the L2 cache and the memory give to one of its processors, µs from a load to
# its data under load, and µs that the last program of a tile needs to add up partial sums.
L2_BYTES, MEMORY_BYTES, LATENCY, REDUCE_TAIL = 42_000, 22_700, 0.8, 2.0
MAX_DOUBLINGS = 2.0  # in any one dimension, between a key and the measured key whose configuration it uses


class LaunchKey(NamedTuple):
    """The properties of a call that its configuration depends on. Widths and ranks of a grouped call are summed."""

    rows: int  # M, rounded up to a power of two
    width: int  # N
    in_features: int  # K
    rank: int  # R
    dtype: str  # "bfloat16", ...
    groups: int  # members of the group

    @classmethod
    def of(cls, rows: int, width: int, in_features: int, rank: int, dtype: torch.dtype, groups: int) -> LaunchKey:
        """The key of a call."""
        name = str(dtype).removeprefix("torch.")
        return cls(_power_of_two(rows), width, in_features, rank, name, groups)


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


def status(kernel: str, gpu: Gpu) -> str:
    """How many measured configurations are used for a GPU, or why none is."""
    return read_entries(kernel, gpu.name, CONFIGS)[1]


def source_stamp(kernel: str) -> str:
    """A hash of the source files of a kernel."""
    folder = Path(__file__).parent
    return hashlib.sha256(b"".join((folder / name).read_bytes() for name in SOURCES[kernel])).hexdigest()[:16]


def config_path(kernel: str, card_name: str, directory: Path = CONFIGS) -> Path:
    """The file of the measured configurations of a GPU and kernel."""
    return directory / f"{kernel}.{card_name.replace(' ', '_').replace('/', '_')}.json"


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
    """Write the file of a GPU."""
    path = config_path(kernel, card_name, directory)
    directory.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"card": card_name, "kernel": kernel, **stamps(kernel), "entries": entries}, indent=1))
    return path


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
    if (key.dtype, key.groups) != (other.dtype, other.groups):
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


class Blocks(NamedTuple):
    """The part of a configuration that decides how often x, h and their partial sums are read."""

    block_r: int  # of the shrink
    splits: int
    reduce: bool
    block_n: int  # of the expand


def microseconds(key: LaunchKey, blocks: Blocks, block_k: int, stages: int, processors: int, members: int) -> float:
    """An estimate of a pair's time, from the bytes that its busiest processor moves. Constants are those of an H100.

    A shrink program reads ``block_r + rows`` rows of ``K / splits`` elements, and stores ``rows * block_r`` sums in
    fp32. An expand program reads ``block_n`` rows of U and all of h: ``rows * R`` elements, or in fp32 once for each
    split if nobody reduces them. All of this crosses the L2 cache, and every weight crosses the memory bus once. Vh
    also cannot arrive faster than the copies in flight allow.

    Args:
        key: the call.
        blocks: the configuration.
        block_k: columns of Vh in a tile.
        stages: tiles in shared memory; all but one are in flight.
        processors: of the GPU.
        members: members of the group whose outputs a program of the expand does not share.
    """
    rows, width, in_features, rank, dtype, _ = key
    size = 4 if dtype == "float32" else 2
    member_rank = -(-rank // members)
    span = -(-in_features // blocks.splits)
    row_block = min(rows, ROW_BLOCK)
    row_tiles = -(-rows // row_block)

    def busiest(programs: int, program_bytes: int) -> float:
        return -(-programs // processors) * program_bytes / L2_BYTES

    programs = row_tiles * blocks.splits * -(-rank // blocks.block_r)
    partials = row_block * blocks.block_r * 4 * (1 + blocks.splits * blocks.reduce)
    in_flight = programs * min((stages - 1) * block_k, span) * blocks.block_r * size
    shrink = max(
        busiest(programs, (blocks.block_r + row_block) * span * size + partials),
        rank * in_features * size / (processors * MEMORY_BYTES),
        rank * in_features * size * LATENCY / in_flight,
    )
    h_bytes = row_block * member_rank * (size if blocks.reduce else 4 * blocks.splits)
    expand = max(
        busiest(row_tiles * -(-width // blocks.block_n), blocks.block_n * member_rank * size + h_bytes),
        width * member_rank * size / (processors * MEMORY_BYTES),
    )
    return shrink + expand + (REDUCE_TAIL if blocks.reduce else 0.0)


def rule_of_thumb(kernel: str, key: LaunchKey, gpu: Gpu) -> Config:
    """An estimate, not measured: the blocks of the least ``microseconds`` whose tiles fit the registers."""
    rows, width, in_features, rank, dtype, groups = key
    full_precision, gated = dtype == "float32", kernel == "lowrank_glu"  # fp32: scalar arithmetic for any rows
    most_rows = FULL_PRECISION_PAIR_ROWS if full_precision else UNTUNED_PAIR_ROWS
    if rows > most_rows or rows * rank > UNTUNED_PAIR_SIZE * groups:
        return replace(MATRIX_PRODUCTS, expand_block_n=128 if gpu.warpgroup_dots else 64)
    scalar, many = rows <= 2, rows > 16 and not full_precision
    few = rows <= UNREDUCED_ROWS and not full_precision and not gated
    block_k = min(128 if many else 256, max(16, _power_of_two(in_features))) >> full_precision
    stages = 4 if scalar else 3
    widest = max(16, _power_of_two(width // groups))
    members = 1 if gated else groups  # a program of the dual expand computes with both members
    outputs = key._replace(width=width // groups) if gated else key
    blocks = min(
        (
            Blocks(block_r, splits, reduce, min(block_n, widest))
            for block_r in ((16, 32, 64) if many else (16,) if scalar else (16, 32))
            for splits in (1, 2, 4, 8, 16)
            if splits <= max(1, in_features // (2 * block_k))
            for reduce in ((False, True) if splits > 1 else (False,))
            if reduce or scalar or splits == 1 or (few and splits <= UNREDUCED_SPLITS)
            for block_n in ((32,) if scalar or gated else (32, 64))
        ),
        key=lambda blocks: microseconds(outputs, blocks, block_k, stages, gpu.processors, members),
    )
    piece = 4096 // blocks.block_n if rows <= 16 else 64  # columns of U per step
    piece >>= gated + (0 if not full_precision else 1 if scalar else 2)
    return Config(
        path="pair",
        block_m=ROW_BLOCK,
        shrink_block_r=blocks.block_r,
        shrink_block_k=block_k,
        splits=blocks.splits,
        shrink_warps=4,
        reduce=blocks.reduce,
        expand_block_n=blocks.block_n,
        expand_block_r=min(piece, max(16, _power_of_two(-(-rank // groups)))),
        expand_warps=4,
        stages=stages,
    )


def _power_of_two(number: int) -> int:
    return 1 << max(0, number - 1).bit_length()
