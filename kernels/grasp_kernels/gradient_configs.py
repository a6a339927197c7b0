"""The tile of the singular-value gradient's kernel, and whether it beats two matrix products: measured, per GPU.

A measurement on this GPU decides: one JSON file per GPU, used only with the Triton version and kernel source that were
measured. Without one, a rule of thumb chooses the tile of a kernel that the caller names, and ``"auto"`` takes the
matrix products.
"""

from __future__ import annotations

import functools
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from .launch_configs import CONFIGS, MAX_DOUBLINGS, read_entries, write_entries
from .triton.launch import Gpu, gpu_of

KERNEL = "singular_value_grad"
# FLOPs in bf16 per byte from the L2 cache: of an H100's 798 TFLOP/s the 0.8 that one program per processor may reach,
# and its 6 TB/s. Both are estimates.
BALANCE = 106


@dataclass(frozen=True)
class Tile:
    """A launch configuration: tokens and ranks per program, step along K and N, Triton's scheduling options."""

    block_t: int
    block_r: int
    block_k: int
    warps: int
    stages: int
    group_t: int = 8  # token tiles that read the same factors from the L2 cache
    descriptors: bool = False  # load through TMA descriptors; one product waits in memory for the other


WIDE = Tile(256, 128, 64, warps=8, stages=4, descriptors=True)
LARGE = Tile(128, 128, 64, warps=8, stages=3)
SMALL = Tile(64, 64, 64, warps=4, stages=4)  # with three stages, sm_120 spills registers
FULL_PRECISION = Tile(64, 64, 32, warps=4, stages=3)  # fp32 uses no tensor cores: registers are the limit
TILES = {torch.float32: (FULL_PRECISION,), torch.float16: (WIDE, LARGE, SMALL), torch.bfloat16: (WIDE, LARGE, SMALL)}


class Measurement(NamedTuple):
    """Times of a call on a GPU, and the kernel's fastest tile."""

    rows: int  # T
    rank: int  # R
    dtype: str  # "bfloat16", ...
    tile: Tile
    microseconds: float  # of the kernel
    matmul_microseconds: float  # of ``routes.chunked``


def choose_tile(gpu: Gpu, tokens: int, rank: int, dtype: torch.dtype, *, described: bool) -> Tile:
    """The tile measured for the nearest call on this GPU, otherwise that of least ``cost``.

    Without ``described``, x and grad_y have layouts that TMA descriptors cannot describe. sm_120 has too little shared
    memory for the tile that needs them.
    """
    measured = nearest(gpu, tokens, rank, dtype, CONFIGS)
    if measured is not None and (described or not measured.tile.descriptors):
        return measured.tile
    tiles = candidates(gpu, dtype, described=described)
    return min(tiles, key=lambda tile: cost(tile, tokens, rank, gpu.processors))


def candidates(gpu: Gpu, dtype: torch.dtype, *, described: bool) -> list[Tile]:
    """The tiles for a call on a GPU; see ``choose_tile`` for ``described``."""
    return [tile for tile in TILES[dtype] if not tile.descriptors or (described and gpu.warpgroup_dots)]


def cost(tile: Tile, tokens: int, rank: int, processors: int) -> float:
    """The time of a tile, to compare tiles: in bytes that a processor reads at its share of the L2 cache's bandwidth.

    It is the larger of two times. All programs read their operands through the L2 cache, which they share. The
    processor with the most programs, ``waves``, multiplies; the others may be idle.
    """
    programs = -(-tokens // tile.block_t) * -(-rank // tile.block_r)
    waves = -(-programs // processors)
    reads = programs / processors * (tile.block_t + tile.block_r)
    return max(reads, waves * tile.block_t * tile.block_r / BALANCE)


def slower(device: torch.device, tokens: int, rank: int, dtype: torch.dtype) -> str | None:
    """Why ``"auto"`` prefers two matrix products to the kernel; ``None`` if the kernel was measured to be faster."""
    gpu = gpu_of(device)
    measured = nearest(gpu, tokens, rank, dtype, CONFIGS)
    if measured is None:
        return f"no measurement on {gpu.name} shows that the kernel is faster than two matrix products"
    if measured.microseconds < measured.matmul_microseconds:
        return None
    return (
        f"two matrix products took {measured.matmul_microseconds:.0f} µs on {gpu.name}, the kernel "
        f"{measured.microseconds:.0f} µs"
    )


def nearest(gpu: Gpu, tokens: int, rank: int, dtype: torch.dtype, directory: Path) -> Measurement | None:
    """The measurement on this GPU nearest to a call, or ``None`` if there is none within ``MAX_DOUBLINGS``."""

    def distance(entry: Measurement) -> float:
        doublings = [abs(math.log2(a / max(b, 1))) for a, b in ((entry.rows, tokens), (entry.rank, rank))]
        return sum(doublings) if max(doublings) <= MAX_DOUBLINGS else math.inf

    name = str(dtype).removeprefix("torch.")
    usable = [entry for entry in _load(gpu.name, directory) if entry.dtype == name and distance(entry) < math.inf]
    return min(usable, key=distance, default=None)


def save(card_name: str, measured: list[Measurement], directory: Path = CONFIGS) -> Path:
    """Write the file of a GPU in place of an earlier one. Later calls of this process follow it."""
    from .dispatch import _select

    entries = [{**entry._asdict(), "tile": asdict(entry.tile)} for entry in measured]
    path = write_entries(KERNEL, card_name, entries, directory)
    _load.cache_clear()
    _select.cache_clear()
    return path


@functools.cache
def _load(card_name: str, directory: Path) -> tuple[Measurement, ...]:
    """The measurements on a GPU; none if the file is missing or was written by another version of the kernel."""
    entries, _ = read_entries(KERNEL, card_name, directory)
    return tuple(Measurement(**{**entry, "tile": Tile(**entry["tile"])}) for entry in entries)
