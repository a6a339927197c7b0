"""Triton: ``((x @ Vh.mT) * s) @ U.mT + bias`` for one or several factors that share x.

``pair`` is two launches: shrink computes h as partial sums over splits of K, then expand. ``fused`` is one cooperative
launch with a grid barrier between the two phases. ``gemms`` is the vendor's matrix products. Partial sums are added in
the order of their splits, so two runs agree bit for bit.

On sm_90 and later both launches of a pair are dependent: they start before the previous kernel P of the stream ends.
Shrink prefetches Vh, expand loads U, then each program waits, and only then lets the next launch start:

* The wait ends when P has ended and its stores are visible. All that P may have written, and all memory that P may
  still use, is touched after it: x, h, the counters, the outputs, s and bias.
* P can be a copy into the weights. Before the wait of shrink, Vh is prefetched only into the second-level cache, where
  all stores end: it cannot be stale there. Expand loads U into registers before its own wait, but it starts only when
  all programs of shrink have ended their wait for P.
* The table of pivoted factors is read like U.
* A launch ends after its wait, so after the end of P, and by induction after the end of all that P waited for: a pair
  after a pair may reuse the memory of h and the counters. Only neighbors run at the same time.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from ..counters import counters
from ..launch_configs import (
    FUSED_RANK,
    FUSED_ROWS,
    REGISTER_BYTES,
    Config,
    LaunchKey,
    choose,
    for_quantized,
    pivoted_product,
)
from ..packing import RANK_MULTIPLE, stacked, widened
from ..quantized import columns_per_scale
from ..reference import Factors, hidden_product, linear
from .launch import Gpu, Launch, gpu_of, run_all
from .lowrank_linear_kernels import (
    BOTH_PHASES,
    _lowrank_expand_kernel,
    _lowrank_fused_kernel,
    _lowrank_shrink_kernel,
)
from .prepared import PREPARED, describe, prepare

SCALES = Factors._fields.index("U_scales")  # the last fields
EXPAND_STAGES, SCALAR_STAGES = 3, 4  # most of an expand: with more shared memory fewer start while the shrink works


def lowrank_linear_grouped(
    x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor] | None = None
) -> list[Tensor]:
    """Several low-rank linears of one input; x is (M, K). One launch for all shrinks and one for all expands.

    If some members are quantised, members that are stored alike share launches.
    """
    factors = [widened(group, pivoted=True) if group.order is not None else group for group in factors]
    if any(group.quantized for group in factors):
        return _run_quantized(x, factors, outputs)
    key, addresses = describe(x, factors, outputs)
    pair = PREPARED.get(key)
    if pair is not None and (replayed := pair.replay(x, addresses, outputs)) is not None:
        return replayed
    config = choose("lowrank_linear", gpu_of(x.device), launch_key(x, factors))
    filled, launches, binaries = _run(x, factors, config, outputs)
    if config.path == "pair" and launches:
        prepare(key, addresses, filled, launches, binaries)
    return filled


def _run_quantized(x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor] | None) -> list[Tensor]:
    outputs = _new_outputs(x, factors) if outputs is None else list(outputs)
    alike = defaultdict(list)
    for group, output in zip(factors, outputs, strict=True):
        sizes = columns_per_scale(group.U_scales, group.rank), columns_per_scale(group.Vh_scales, x.shape[1])
        alike[group.U.dtype, group.Vh.dtype, sizes].append((group, output))
    for members in alike.values():
        groups, places = zip(*members, strict=True)
        run(x, groups, for_quantized(gpu_of(x.device), launch_key(x, groups)), places)
    return outputs


def launch_key(x: Tensor, factors: Sequence[Factors]) -> LaunchKey:
    """The key of a call's configuration."""
    width, rank = sum(group.out_features for group in factors), sum(group.rank for group in factors)
    pivots = sum(group.pivots for group in factors)
    return LaunchKey.of(x.shape[0], width, x.shape[1], rank, x.dtype, len(factors), pivots)


def run(x: Tensor, factors: Sequence[Factors], config: Config, outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """Run a call with a given configuration; ``outputs``, (M, N_i) with unit inner strides, are filled if given.

    The members must be stored alike: the dtypes of their U, and of their Vh, and the sizes of their groups agree.
    """
    return _run(x, factors, config, outputs)[0]


def _run(
    x: Tensor, factors: Sequence[Factors], config: Config, outputs: Sequence[Tensor] | None
) -> tuple[list[Tensor], list[Launch], list[Any]]:
    """The outputs of a call, its launches, and their binaries."""
    if config.path == "gemms":
        return gemms(x, factors, outputs), [], []
    outputs = _new_outputs(x, factors) if outputs is None else list(outputs)
    if not any(output.numel() for output in outputs):
        return outputs, [], []
    launches = plan(x, factors, outputs, config, gpu_of(x.device))
    return outputs, launches, run_all(launches, x.device)


def _new_outputs(x: Tensor, factors: Sequence[Factors]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], group.out_features) for group in factors]


def plan(x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor], config: Config, gpu: Gpu) -> list[Launch]:
    """The launches of a call, in order: one for ``fused``, if rows, ranks and dtypes allow it, else two.

    ``outputs`` are (M, N_i) with unit inner strides. Factors without a unit inner stride are copied first.
    """
    x, factors = unit_stride(x), [row_major(group) for group in factors]
    hidden = new_hidden(x, factors, config)
    floating = not any(group.quantized for group in factors)
    if config.path == "fused" and floating and x.shape[0] <= FUSED_ROWS and max_rank(factors) <= FUSED_RANK:
        return [fused_launch(x, factors, outputs, hidden, config, gpu)]
    return [
        shrink_launch(x, factors, hidden, config, gpu),
        expand_launch(factors, outputs, hidden, config, dependent=gpu.dependent_launch),
    ]


def gemms(x: Tensor, factors: Sequence[Factors], outputs: Sequence[Tensor] | None = None) -> list[Tensor]:
    """The vendor's matrix products: one for all Vh of a packed group, then one per member; quantised ones dequantised.

    If a member is pivoted and in 16 bits, the expand kernel is its second product: it stores each output in its place.
    """
    factors = [group.dequantized(x.shape[1], x.dtype) if group.quantized else group for group in factors]
    hs = hidden_gemm(x, [group.Vh for group in factors])
    places = [None] * len(factors) if outputs is None else outputs
    scatters = x.dtype != torch.float32 and x.shape[0] > 0  # in fp32 the vendor's product is faster
    ys = []
    for h, group, output in zip(hs, factors, places, strict=True):
        if not scatters or group.order is None:
            ys.append(expand_gemm(h, group, output))
            continue
        ys.append(h.new_empty(h.shape[0], group.out_features) if output is None else output)
        run_all([pivoted_launch(h, row_major(group), ys[-1], gpu_of(x.device))], x.device)
    return ys


def pivoted_launch(h: Tensor, factors: Factors, output: Tensor, gpu: Gpu) -> Launch:
    """The expand of pivoted factors after a matrix product: h is (M, R) in the dtype of U, with a unit inner stride."""
    return expand_launch([factors], [output], h.unsqueeze(0), pivoted_product(gpu), dependent=False)


def hidden_gemm(x: Tensor, Vhs: Sequence[Tensor]) -> Sequence[Tensor]:
    """``x @ Vh.mT`` for each member, (M, R_i) in the dtype of x; slices of one product if the Vh are stacked."""
    whole = stacked(Vhs)
    if whole is None:
        return [hidden_product(x, Vh) for Vh in Vhs]
    return hidden_product(x, whole).split([Vh.shape[0] for Vh in Vhs], dim=1)


def expand_gemm(h: Tensor, factors: Factors, output: Tensor | None = None) -> Tensor:
    """``(h * s) @ U.mT + bias``, written to ``output`` if given; in fp16 s scales U, because h could overflow."""
    U, s, _, bias, order, *_ = factors
    if s is not None and h.dtype == torch.float16:
        U = (U.float() * s).to(U.dtype)
    elif s is not None:
        h = (h.float() * s).to(h.dtype)
    return linear(h, U, bias, output, order)


def new_hidden(x: Tensor, factors: Sequence[Factors], config: Config) -> Tensor:
    """Memory for h from PyTorch's allocator, so it belongs to the stream or graph: (splits, M, columns) in fp32.

    With ``reduce``, one more (M, columns) follows for the reduced h.
    """
    columns = sum(triton.cdiv(group.rank, RANK_MULTIPLE) * RANK_MULTIPLE for group in factors)
    return x.new_empty((config.splits + config.reduce, x.shape[0], columns), dtype=torch.float32)


def shrink_launch(
    x: Tensor,
    factors: Sequence[Factors],
    hidden: Tensor,
    config: Config,
    gpu: Gpu,
    order: Tensor | None = None,
    entries: Tensor | None = None,
) -> Launch:
    """Fill ``hidden`` with the partial sums of ``x @ Vh.mT``, one per split of K; ``entries[order]`` with 0 … N - 1."""
    Vhs, scales = [group.Vh for group in factors], [group.Vh_scales for group in factors]
    quantized = scales[0] is not None
    if not quantized and all(group.rank % RANK_MULTIPLE == 0 for group in factors):
        whole = stacked(Vhs)
        Vhs = Vhs if whole is None else [whole]
    tiles = _tiles((Vh.shape[0] for Vh in Vhs), config.shrink_block_r)
    row_tiles = triton.cdiv(x.shape[0], row_block(x.shape[0], config))
    return Launch(
        _lowrank_shrink_kernel,
        (tiles, config.splits, row_tiles),
        {
            **_shrink_arguments(x, Vhs, hidden, config),
            "counter_ptr": counters(x.device, 1 + tiles * row_tiles) if config.reduce else hidden,
            "order_ptr": order,
            "entries_ptr": entries,
            "vh_scales_ptrs": optional(scales, hidden)[0] if quantized else None,
            "VH_GROUP": columns_per_scale(scales[0], x.shape[1]),
            "N": None if order is None else order.shape[0],
            "ENTRIES": 0 if order is None else triton.next_power_of_2(triton.cdiv(len(order), tiles * config.splits)),
            "BLOCK_R": config.shrink_block_r,
            "DEPENDENT": gpu.dependent_launch,
        },
        launch_options(config.shrink_warps, config.stages, gpu.dependent_launch),
    )


def expand_launch(
    factors: Sequence[Factors], outputs: Sequence[Tensor], hidden: Tensor, config: Config, *, dependent: bool
) -> Launch:
    """Compute the outputs from ``hidden``. With ``dependent`` it starts early, loads U, and waits for the shrink."""
    tiles = _tiles((output.shape[1] for output in outputs), config.expand_block_n)
    rows, rank, scales = hidden.shape[1], max_rank(factors), [group.U_scales for group in factors]
    quantized = scales[0] is not None
    loaded = 0 if config.path == "gemms" else tiles_ahead(rows, factors, config)
    stages = expand_stages(rows, config)
    return Launch(
        _lowrank_expand_kernel,
        (tiles, triton.cdiv(rows, row_block(rows, config))),
        {
            **_expand_arguments(factors, outputs, hidden, config),
            "u_scales_ptrs": optional(scales, hidden)[0] if quantized else None,
            "U_GROUP": columns_per_scale(scales[0], factors[0].rank),
            "ranks": tuple(group.rank for group in factors),
            "STAGES": stages,
            "BLOCK_R": config.expand_block_r,
            "SPLITS": config.splits,
            "REDUCE": config.reduce,
            "TILES": loaded,
            "LOOPED": rank > loaded * config.expand_block_r,
            "DEPENDENT": dependent,
        },
        launch_options(config.expand_warps, stages, dependent),
    )


def tiles_ahead(rows: int, factors: Sequence[Factors], config: Config, count: int = 1) -> int:
    """How many tiles of ``count`` U an expand loads before it waits for h: all, if the registers hold them and h.

    With a rank that is no multiple of 16, both are loaded by single elements, and each takes a register of four bytes.
    """
    block_m, block_n = max(16, row_block(rows, config)), config.expand_block_n
    free = REGISTER_BYTES * 32 * config.expand_warps - block_m * block_n * 4
    ragged = any(group.U.shape[1] % RANK_MULTIPLE for group in factors)
    grouped = columns_per_scale(factors[0].U_scales, factors[0].rank) > 0  # U is multiplied in fp32
    element = 4 if ragged else 3 if grouped else max(2, factors[0].U.element_size())  # of h, and of U in a dot
    # Registers for h: more if outputs are taken from it, or if single elements of many partial sums are added up.
    added = ragged and not config.reduce and config.splits > 2
    copies = 1 + any(group.order is not None for group in factors) + 2 * added
    tile = (copies * block_m + block_n) * config.expand_block_r * element * count
    return max(1, min(triton.cdiv(max_rank(factors), config.expand_block_r), free // tile))


def expand_stages(rows: int, config: Config) -> int:
    """Stages of an expand's loop over the rank."""
    return min(config.stages, SCALAR_STAGES if rows <= 2 else EXPAND_STAGES)


def launch_options(warps: int, stages: int, dependent: bool) -> dict[str, Any]:
    """Launch options of a kernel of a pair; ``dependent``: it may start before the previous launch ends."""
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return options | {"launch_pdl": True} if dependent else options


def fused_launch(
    x: Tensor,
    factors: Sequence[Factors],
    outputs: Sequence[Tensor],
    hidden: Tensor,
    config: Config,
    gpu: Gpu,
    *,
    programs: int | None = None,
    phase: int = BOTH_PHASES,
) -> Launch:
    """Both phases in one cooperative launch, by default of at most one program per processor."""
    rank_tiles = _tiles((group.rank for group in factors), config.shrink_block_r)
    width_tiles = _tiles((output.shape[1] for output in outputs), config.expand_block_n)
    if programs is None:
        programs = min(gpu.processors, max(rank_tiles * config.splits, width_tiles))
    return Launch(
        _lowrank_fused_kernel,
        (programs,),
        {
            **_shrink_arguments(x, [group.Vh for group in factors], hidden, config),
            **_expand_arguments(factors, outputs, hidden, config),
            "counter_ptr": counters(x.device, 1 + rank_tiles),
            "rank_tiles": rank_tiles,
            "width_tiles": width_tiles,
            "SHRINK_R": config.shrink_block_r,
            "BLOCK_R": max(16, triton.next_power_of_2(max_rank(factors))),
            "PHASE": phase,
        },
        {
            "num_warps": config.expand_warps,
            "num_stages": config.stages,
            "enable_fp_fusion": True,
            "launch_cooperative_grid": True,
        },
    )


def _shrink_arguments(x: Tensor, Vhs: Sequence[Tensor], hidden: Tensor, config: Config) -> dict[str, Any]:
    return {
        "x_ptr": x,
        "vh_ptrs": tuple(Vhs),
        "h_ptr": hidden,
        "ranks": tuple(Vh.shape[0] for Vh in Vhs),
        "vh_strides": tuple(map(_row_stride, Vhs)),
        "M": x.shape[0],
        "K": x.shape[1],
        "stride_xm": x.stride(0),
        "stride_hm": hidden.stride(1),
        "BLOCK_M": row_block(x.shape[0], config),
        "BLOCK_K": config.shrink_block_k,
        "SPLITS": config.splits,
        "STAGES": config.stages,
        "REDUCE": config.reduce,
    }


def _expand_arguments(
    factors: Sequence[Factors], outputs: Sequence[Tensor], hidden: Tensor, config: Config
) -> dict[str, Any]:
    s_ptrs, scales = optional([group.s for group in factors], hidden)
    bias_ptrs, biases = optional([group.bias for group in factors], hidden)
    rows, pivoted = hidden.shape[1], any(group.order is not None for group in factors)
    return {
        "u_ptrs": tuple(group.U for group in factors),
        "s_ptrs": s_ptrs,
        "bias_ptrs": bias_ptrs,
        "y_ptrs": tuple(outputs),
        "h_ptr": hidden,
        "order_ptrs": optional([group.order for group in factors], hidden)[0] if pivoted else None,
        "widths": tuple(output.shape[1] for output in outputs),
        "pivots": tuple(group.pivots for group in factors) if pivoted else None,
        "u_strides": tuple(_row_stride(group.U) for group in factors),
        "y_strides": tuple(output.stride(0) for output in outputs),
        "M": rows,
        "stride_hm": hidden.stride(1),
        "BLOCK_M": row_block(rows, config),
        "BLOCK_N": config.expand_block_n,
        "SCALES": scales,
        "BIASES": biases,
        "STAGES": config.stages,
    }


def optional(tensors: Sequence[Tensor | None], placeholder: Tensor) -> tuple[tuple[Tensor, ...], int]:
    """The s or biases of a group as kernel arguments of one type, and a bit mask of the members that have one.

    A member without one gets that of another member, or the placeholder if no member has one. The kernel does not read
    it, because of the mask.
    """
    present = [tensor for tensor in tensors if tensor is not None]
    if not present:
        return (placeholder,), 0
    if len({tensor.dtype for tensor in present}) > 1:
        tensors = [None if tensor is None else tensor.float() for tensor in tensors]
        present = [tensor for tensor in tensors if tensor is not None]
    mask = sum(1 << index for index, tensor in enumerate(tensors) if tensor is not None)
    return tuple(present[0] if tensor is None else tensor for tensor in tensors), mask


def unit_stride(tensor: Tensor) -> Tensor:
    """The tensor, or a contiguous copy if the stride of its last dimension is not 1."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_major(factors: Factors) -> Factors:
    """The factors with unit inner strides, int4 and scales without gaps; tensors with other strides are copied."""
    dense = [None if tensor is None else unit_stride(tensor) for tensor in factors]
    for index, tensor in enumerate(dense):
        if tensor is not None and (tensor.dtype == torch.uint8 or index >= SCALES):
            dense[index] = tensor.contiguous()
    return Factors(*dense)  # type: ignore[arg-type]


def _row_stride(matrix: Tensor) -> int:
    """The elements of a row and of the gap behind it; int4 have none, also if there is one row, of any stride."""
    return matrix.shape[1] if matrix.dtype == torch.uint8 else matrix.stride(0)


def row_block(rows: int, config: Config) -> int:
    """Rows of a tile: one or two for scalar arithmetic, else those of the smallest dot that holds all rows."""
    return max(1, rows) if rows <= 2 else min(config.block_m, max(16, triton.next_power_of_2(rows)))


def max_rank(factors: Sequence[Factors]) -> int:
    """The largest rank of a group."""
    return max(group.rank for group in factors)


def _tiles(sizes: Iterable[int], block: int) -> int:
    return sum(triton.cdiv(size, block) for size in sizes)
