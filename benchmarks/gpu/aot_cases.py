"""Launches that are compiled ahead of time, and the checks of their binaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.gpu.sass import SHARED_LIMITS, Binary, load_width
from grasp_kernels.gradient_configs import FULL_PRECISION, LARGE, SMALL, WIDE, Tile
from grasp_kernels.launch_configs import for_quantized, on_path, rule_of_thumb, serves
from grasp_kernels.quantized import KINDS, stored_columns
from grasp_kernels.reference import Factors
from grasp_kernels.triton import lowrank_glu, lowrank_linear, singular_value_grad
from grasp_kernels.triton.launch import Gpu, Launch

# A card of each architecture: A100, H100, B200, RTX 5090.
CARDS = {
    architecture: Gpu(f"sm_{architecture}", processors, architecture)
    for architecture, processors in ((80, 108), (90, 132), (100, 148), (120, 170))
}
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TENSOR_CORES = ("HMMA", "HGMMA", "UTCHMMA")
# griddepcontrol.wait and .launch_dependents, cp.async.bulk.prefetch.L2
WAIT, LAUNCH_DEPENDENTS, PREFETCH = "ACQBULK", "PREEXIT", "UBLKPF"
MEMORY = ("LD.", "LDG", "ST.", "STG", "ATOM.", "ATOMG", "RED.", "REDG", "UTMA")  # accesses of global memory
SET_ASIDE = 16  # bytes per thread: the assembler sets up to four registers aside, outside the loops where it was read
SPIN, INVALIDATE = "LDG.E.STRONG.GPU", "CCTL.IVALL"  # together: ld.acquire.gpu of one word
_HIDDEN = re.compile(r"LDG.*\.STRONG\.GPU")  # ld.cg: a load of h


@dataclass(frozen=True)
class AotCase:
    """A call whose launches are compiled: by ``make aot``, and by the test suite if ``representative``."""

    name: str
    launches: Callable[[Gpu], Sequence[Launch]]
    representative: bool = False


def cases() -> Iterator[AotCase]:
    """All configurations."""
    yield from _singular_value_grad_cases()
    yield from _lowrank_linear_cases("pair", (1, 2, 4, 16, 64, 256))
    yield from _lowrank_linear_cases("fused", (1, 2, 4, 16, 64))
    yield from _lowrank_glu_cases()
    yield from _pivoted_cases()
    yield from _quantized_cases()


def complaints(launch: Launch, binary: Binary) -> list[str]:
    """Everything wrong with a binary."""
    arguments, architecture = launch.arguments, binary.architecture
    errors = []
    if (spilled := binary.stack + binary.local) > SET_ASIDE:
        errors.append(f"spills registers ({spilled} bytes per thread)")
    if binary.shared > SHARED_LIMITS[architecture]:
        errors.append(f"{binary.shared} bytes of shared memory, the card has {SHARED_LIMITS[architecture]}")
    loads = binary.loads()
    narrow = _is_narrow(launch)
    if _reads_factors(launch) and not loads[16] and not narrow:
        errors.append("no 16-byte loads of the factors")
    if loads[2] and not (arguments.get("BIASES") or narrow or _gathers(launch) or _is_quantized(launch)):
        errors.append(f"{loads[2]} loads of 2 bytes")
    if _has_dot(launch) and not any(map(binary.count, TENSOR_CORES)):
        errors.append("a 16-bit dot without tensor cores")
    if _has_descriptors(launch) and not binary.count("UTMALDG"):
        errors.append("TMA descriptors without TMA loads")
    if launch.kernel.__name__.startswith("_singular_value_grad") and _has_dot(launch):
        errors += ["no HGMMA"] if architecture == 90 and not binary.count("HGMMA") else []
    errors += dependent_complaints(launch, binary)
    if launch.options.get("launch_cooperative_grid"):
        errors += barrier_complaints(binary)
    if (ahead := copied_ahead(launch, binary)) < (least := _least_copied_ahead(launch)):
        errors.append(f"loops copy {ahead} bytes ahead, expected at least {least}")
    if (fetched := prefetched(launch, binary)) < (least := _least_prefetched(launch)):
        errors.append(f"{fetched} bytes of U are requested at once before h, expected at least {least}")
    return errors


def dependent_complaints(launch: Launch, binary: Binary) -> list[str]:
    """Errors in a dependent launch. Until it has waited, it may only prefetch Vh, or load U if it is an expand.

    It must wait before it lets the next launch start. A launch that is not dependent must do neither.
    """
    names, dependent = binary.instructions, bool(launch.arguments.get("DEPENDENT"))
    if dependent != bool(launch.options.get("launch_pdl")):
        return ["the option launch_pdl and the argument DEPENDENT differ"]
    if not dependent:
        used = binary.count(WAIT) + binary.count(LAUNCH_DEPENDENTS) + binary.count(PREFETCH)
        return ["programmatic dependent launch where there is none"] if used else []
    if not (WAIT in names and LAUNCH_DEPENDENTS in names):
        return ["programmatic dependent launch is missing"]
    early, expands = names[: names.index(WAIT)], "TILES" in launch.arguments
    errors = []
    if LAUNCH_DEPENDENTS in early:
        errors.append("the next launch may start before the wait")
    if any(name.startswith(MEMORY) and not (expands and name.startswith("LDG") and ".EF" in name) for name in early):
        errors.append("memory is used before the wait for the previous launch")
    if expands == any(name.startswith(PREFETCH) for name in early):
        errors.append("U is prefetched" if expands else "Vh is not prefetched before the wait")
    return errors


def copied_ahead(launch: Launch, binary: Binary) -> int:
    """Bytes that a program's loops keep in flight by asynchronous copies: of ``num_stages`` tiles, all but one.

    The code names each copy ``num_stages`` times: before the loop for all tiles but one, and once inside.
    """
    stages = launch.options.get("num_stages", 1)
    return binary.copied_bytes() * 32 * launch.options["num_warps"] * (stages - 1) // stages


def prefetched(launch: Launch, binary: Binary) -> int:
    """Bytes of U that a program of an expand requests at once: before h, and before anything waits for the first."""
    names = binary.instructions
    first = next((place for place, name in enumerate(names) if name == WAIT or _HIDDEN.match(name)), 0)
    loads = [place for place, name in enumerate(names[:first]) if name.startswith("LDG") and ".EF" in name]
    if not loads:
        return 0
    waits = (place for place in range(loads[0], first) if names[place].startswith(("STS", "BAR")))
    end = next(waits, first)
    return sum(load_width(names[place]) for place in loads if place < end) * 32 * launch.options["num_warps"]


def requested(launch: Launch, binary: Binary) -> int:
    """Bytes of h that a program of an expand requests before it uses the first of them: later loads replace earlier."""
    names = binary.instructions
    first = next((place for place, name in enumerate(names) if _HIDDEN.match(name)), len(names))
    rest = names[first:]
    used = next((place for place, name in enumerate(rest) if name.startswith(("FADD", "FMUL", "FFMA", "STS"))), 0)
    loads = [load_width(name) for name in rest[:used] if _HIDDEN.match(name)]
    return sum(loads) * 32 * launch.options["num_warps"]


def _least_prefetched(launch: Launch) -> int:
    """Bytes of the tiles of U that an expand of a pair must request before h; 0 for another launch."""
    arguments = launch.arguments
    if not arguments.get("TILES"):
        return 0
    factors = 2 if "gate_u_ptr" in arguments and arguments["up_entries_ptr"] is None else 1
    return factors * arguments["TILES"] * _tile_bytes(launch, arguments["BLOCK_N"] * arguments["BLOCK_R"])


def _least_copied_ahead(launch: Launch) -> int:
    """Bytes of the factor that a loop of a low-rank kernel must copy ahead; 0 for a kernel without such a loop."""
    arguments = launch.arguments
    if (
        not launch.kernel.__name__.startswith("_lowrank")
        or not ("BLOCK_K" in arguments or arguments["LOOPED"])
        or _is_narrow(launch)
    ):
        return 0
    block_r = arguments.get("SHRINK_R", arguments["BLOCK_R"])
    tile = _tile_bytes(launch, block_r * arguments.get("BLOCK_K", arguments.get("BLOCK_N")))
    return (launch.options["num_stages"] - 1) * tile


def _tile_bytes(launch: Launch, elements: int) -> int:
    """Bytes of a tile of the factor that a low-rank kernel reads, Vh if it reads both; two int4 share one."""
    arguments = launch.arguments
    factor = arguments.get("vh_ptrs", arguments.get("u_ptrs", (_matrix(arguments),)))[0]
    return int(elements * factor.element_size() // (2 if factor.dtype == torch.uint8 else 1))


def barrier_complaints(binary: Binary) -> list[str]:
    """Errors in the grid's barrier, which must arrive (an atomic), fetch U, then spin (acquiring loads)."""
    memory = [name for name in binary.instructions if name.startswith(("LDG", "ATOM", INVALIDATE))]
    # An acquiring load is followed by an invalidation of the first-level cache.
    spins = [place for place, pair in enumerate(pairwise(memory)) if pair[0] == SPIN and pair[1].startswith(INVALIDATE)]
    arrivals = [place for place, name in enumerate(memory) if name.startswith("ATOM") and spins and place < spins[0]]
    if not arrivals:
        return [f"expected a barrier (an atomic, then an acquiring {SPIN}), found none"]
    between = memory[arrivals[-1] : spins[0]]
    return [] if any(".EF" in name for name in between) else ["U is not fetched between arrival and wait"]


def _reads_factors(launch: Launch) -> bool:
    return not launch.kernel.__name__.endswith("_reduce_kernel")


def _is_narrow(launch: Launch) -> bool:
    """Whether an expand reads a U without padding: single elements, which cannot be copied ahead."""
    return "TILES" in launch.arguments and any(rank % 16 for rank in launch.arguments.get("ranks", ()))


def _gathers(launch: Launch) -> bool:
    """Whether a gated linear unit reads single elements of h in 16 bits: outputs of pivoted factors."""
    return launch.arguments.get("gate_order_ptr") is not None or launch.arguments.get("up_entries_ptr") is not None


def _is_quantized(launch: Launch) -> bool:
    """Whether a launch reads scales, in 16 bits: one for each row, or for each group of its columns."""
    return launch.arguments.get("vh_scales_ptrs") is not None or launch.arguments.get("u_scales_ptrs") is not None


def _has_descriptors(launch: Launch) -> bool:
    return any(isinstance(value, TensorDescriptor) for value in launch.arguments.values())


def _has_dot(launch: Launch) -> bool:
    """Whether the launch multiplies 16-bit matrices on tensor cores; tiles of one or two rows use scalar arithmetic."""
    scalar = launch.arguments.get("BLOCK_M", 16) < 16
    return _reads_factors(launch) and not scalar and _matrix(launch.arguments).dtype != FP32


def _matrix(arguments: Mapping[str, Any]) -> Tensor:
    """The first two-dimensional argument: it has the dtype of the factors."""
    values = (value.base if isinstance(value, TensorDescriptor) else value for value in _flat(arguments.values()))
    return next(value for value in values if isinstance(value, Tensor) and value.dim() == 2)


def _flat(values: Any) -> Iterator[Any]:
    for value in values:
        yield from _flat(value) if isinstance(value, tuple) else (value,)


def _empty(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.empty(*shape, dtype=dtype, device="meta")


def _factors(
    N: int, K: int, R: int, dtype: torch.dtype, *, pivots: int = 0, scaled: bool = False, biased: bool = False
) -> Factors:
    s = _empty(R, dtype=FP32) if scaled else None
    bias, order = _empty(N, dtype=dtype) if biased else None, _empty(N, dtype=torch.int32) if pivots else None
    return Factors(_empty(N - pivots, R, dtype=dtype), s, _empty(R, K, dtype=dtype), bias, order)


# --- singular_value_grad ----------------------------------------------------------------------------------------------


def _singular_value_grad_cases() -> Iterator[AotCase]:
    yield _grad_case("samples, token squares, mask", LARGE, representative=True)
    yield _grad_case("samples, token squares, mask, small tile", SMALL)
    for dtype, tile in ((BF16, LARGE), (BF16, SMALL), (FP16, LARGE), (FP16, SMALL), (FP32, FULL_PRECISION)):
        yield _grad_case(f"plain sum, {_short(dtype)}, tile of {tile.block_t}", tile, dtype=dtype, plain=True)
    for dtype in (BF16, FP16):
        yield _grad_case(f"wide tile, samples, token squares, mask, {_short(dtype)}", WIDE, dtype=dtype)
    yield _grad_case("wide tile, plain sum, rank 81", WIDE, plain=True, R=81)
    yield _grad_case("rank 81", LARGE, R=81)
    yield _grad_case("U column-major", LARGE, column_major=True)


def _grad_case(
    name: str,
    tile: Tile,
    *,
    dtype: torch.dtype = BF16,
    plain: bool = False,
    R: int = 512,
    column_major: bool = False,
    representative: bool = False,
) -> AotCase:
    def launches(gpu: Gpu) -> Sequence[Launch]:
        if tile.descriptors and not gpu.warpgroup_dots:
            return []
        T, K, N, B = 8192, 4096, 11008, 16
        U = _empty(R, N, dtype=dtype).mT if column_major else _empty(N, R, dtype=dtype)
        return singular_value_grad.plan(
            *(_empty(T, K, dtype=dtype), _empty(T, N, dtype=dtype), U, _empty(R, K, dtype=dtype)),
            None if plain else _empty(B + 1, dtype=torch.int64),
            "none" if plain else "token",
            None if plain else _empty(T, dtype=torch.bool),
            [_empty(R, dtype=FP32)] * 2 if plain else [_empty(B, R, dtype=FP32)] * 2,
            tile,
        )

    return AotCase(f"singular_value_grad, {name}", launches, representative)


# --- lowrank_linear ---------------------------------------------------------------------------------------------------

SHAPES = ((4096, 4096, 208), (11008, 4096, 304), (1024, 4096, 96), (4096, 14336, 320))  # N, K, R: packed
QKV = ((4096, 208), (1024, 96), (1024, 96))  # N, R


def _lowrank_linear_cases(path: str, rows: Sequence[int]) -> Iterator[AotCase]:
    for M in rows:
        for N, K, R in SHAPES:
            first = SHAPES[0] == (N, K, R) and M in ((1, 16) if path == "pair" else (16,))
            yield _linear_case(f"{path}, {M} rows, {N}x{K}, rank {R}", path, M, [_factors(N, K, R, BF16)], first)
    for M in (1, 2, 4, 16, 32) if path == "pair" else ():
        group = [_factors(4096, 4096, 1638, BF16)]
        yield _linear_case(f"{path}, {M} rows, 4096x4096, rank 1638 without padding", path, M, group)
    for M in (1, 16):
        yield _linear_case(f"{path}, {M} rows, q/k/v", path, M, [_factors(N, 4096, R, BF16) for N, R in QKV])
        for dtype in (BF16, FP16, FP32):
            group = [_factors(4096, 4096, 208, dtype, scaled=True, biased=True)]
            yield _linear_case(f"{path}, {M} rows, {_short(dtype)}, s and bias", path, M, group)
        mixed = [_factors(N, 4096, R, BF16, pivots=R - 4 if N == 4096 else 0) for N, R in QKV]
        yield _linear_case(f"{path}, {M} rows, q/k/v, q pivoted", path, M, mixed)


def _pivoted_cases() -> Iterator[AotCase]:
    """Packed factors whose logical ranks are no multiples of 16, and one of half of the dense parameters."""
    for M in (1, 2, 16, 64):
        for N, K, R in (SHAPES[0], SHAPES[3], (4096, 4096, 1648)):
            group = [_factors(N, K, R, BF16, pivots=R - 4)]
            first = SHAPES[0] == (N, K, R) and M == 16
            yield _linear_case(f"pair, pivoted, {N}x{K}, rank {R - 4} of {R}, M = {M}", "pair", M, group, first)
    for M in (1, 16, 64):
        yield _linear_case(f"fused, pivoted, M = {M}", "fused", M, [_factors(4096, 4096, 208, BF16, pivots=204)])
    for dtype in (FP16, FP32):
        group = [_factors(4096, 4096, 208, dtype, pivots=208, biased=True)]
        yield _linear_case(f"pair, pivoted, M = 16, {_short(dtype)}, bias", "pair", 16, group)
    yield AotCase("lowrank_linear, gemms, pivoted, M = 2048", _pivoted_product)
    for M in (1, 16, 64, 2048):
        yield _glu_case(M, "silu", BF16, pivots=4)


FORMS = (("int8", None), ("fp8", None), ("int4", None), ("int4", 64))  # columns per scale; None: the row


def _quantized_cases() -> Iterator[AotCase]:
    """Ranks are multiples of 32, so that rows of int4 start at multiples of 16 bytes."""
    for kind, group in FORMS:
        for M in (1, 4, 16, 64, 256):
            yield _quantized_case(kind, group, M, representative=(M, group) == (16, 64))
        yield _quantized_case(kind, group, 16, R=1632, pivots=1632)
        for M in (1, 16):  # the rows for which a dense quantised linear is factors of full rank
            yield _quantized_case(kind, group, M, R=4096, pivots=4096)


def _quantized_case(
    kind: str, group: int | None, M: int, *, R: int = 224, pivots: int = 0, representative: bool = False
) -> AotCase:
    dtype = next(dtype for dtype, name in KINDS.items() if name == kind)

    def matrix(rows: int, depth: int) -> tuple[Tensor, Tensor]:
        groups = 1 if group is None else -(-depth // group)
        return _empty(rows, stored_columns(dtype, depth), dtype=dtype), _empty(rows, groups)

    def launches(gpu: Gpu) -> Sequence[Launch]:
        if kind == "fp8" and gpu.capability < 89:
            return []
        N, K = 4096, 4096
        (U, U_scales), (Vh, Vh_scales) = matrix(N - pivots, R), matrix(R, K)
        order = _empty(N, dtype=torch.int32) if pivots else None
        factors, x = [Factors(U, None, Vh, None, order, U_scales, Vh_scales)], _empty(M, K)
        config = for_quantized(gpu, lowrank_linear.launch_key(x, factors))
        return lowrank_linear.plan(x, factors, [_empty(M, N)], config, gpu)

    scales = "rows" if group is None else f"groups of {group}"
    name = f"{kind}, scales of {scales}, 4096x4096, rank {R}{', pivoted' * (pivots > 0)}, M = {M}"
    return AotCase(f"lowrank_linear, {name}", launches, representative)


def _pivoted_product(gpu: Gpu) -> Sequence[Launch]:
    N, K, R = SHAPES[0]
    return [lowrank_linear.pivoted_launch(_empty(2048, R), _factors(N, K, R, BF16, pivots=R), _empty(2048, N), gpu)]


def _linear_case(name: str, path: str, M: int, factors: Sequence[Factors], representative: bool = False) -> AotCase:
    def launches(gpu: Gpu) -> Sequence[Launch]:
        x = _empty(M, factors[0].Vh.shape[1], dtype=factors[0].U.dtype)
        key = lowrank_linear.launch_key(x, factors)
        config = on_path(rule_of_thumb("lowrank_linear", key, gpu), path, key)
        outputs = [_empty(M, group.out_features, dtype=x.dtype) for group in factors]
        return lowrank_linear.plan(x, factors, outputs, config, gpu) if serves(config, key) else []

    return AotCase(f"lowrank_linear, {name}", launches, representative)


# --- lowrank_glu ------------------------------------------------------------------------------------------------------


def _lowrank_glu_cases() -> Iterator[AotCase]:
    for M in (1, 2, 16, 64, 2048):
        for activation in ("silu", "gelu", "gelu_tanh", "relu") if M in (1, 16) else ("silu",):
            yield _glu_case(M, activation, BF16, representative=(M, activation) == (16, "silu"))
    for dtype in (FP16, FP32):
        yield _glu_case(16, "silu", dtype)


def _glu_case(M: int, activation: str, dtype: torch.dtype, *, pivots: int = 0, representative: bool = False) -> AotCase:
    """Both members have ranks that end ``pivots`` before a multiple of 16 and are pivoted, if it is not 0."""

    def launches(gpu: Gpu) -> Sequence[Launch]:
        N, K, R = SHAPES[1]
        x, output = _empty(M, K, dtype=dtype), _empty(M, N, dtype=dtype)
        gate, up = (_factors(N, K, rank, dtype, pivots=pivots and rank - pivots) for rank in (R, R - 16))
        config = rule_of_thumb("lowrank_glu", lowrank_linear.launch_key(x, [gate, up]), gpu)
        if config.path == "gemms":
            hidden = [_empty(1, M, group.U.shape[1], dtype=dtype) for group in (gate, up)]
            second = (hidden, up.order, output, activation, config)
            return [lowrank_glu.expand_launch(gate, up, *second, dependent=False)]
        return lowrank_glu.plan(x, gate, up, activation, output, config, gpu)

    name = f"lowrank_glu, {M} rows, {activation}, {_short(dtype)}{', pivoted' * (pivots > 0)}"
    return AotCase(name, launches, representative)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
