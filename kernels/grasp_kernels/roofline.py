"""The roofline of each op: bytes, FLOPs and the least time they take on a device, launches excluded."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


@dataclass(frozen=True)
class Card:
    """The peak rates of one device, or those measured of a large matmul, and of reading or copying a large tensor.

    Raises:
        ValueError: if a rate is not positive.
    """

    name: str
    flops: float  # FLOP/s in the dtype in question; bf16 with fp32 accumulation, without sparsity, in CARDS
    bandwidth: float  # bytes/s of main memory
    fp32: float = 0.0  # FLOP/s in fp32, and in fp64 with tensor cores where there are any; 0 if not known
    fp64: float = 0.0

    def __post_init__(self) -> None:
        if self.flops <= 0 or self.bandwidth <= 0:
            raise ValueError(
                f"flops and bandwidth must be positive, got {self.flops} FLOP/s and {self.bandwidth} bytes/s"
            )


# Peaks from the vendors' data sheets and architecture white papers. A good kernel reaches 75 to 90 % of them.
# A consumer card has 1/64 of its fp32 rate in fp64.
_DATASHEET = (
    Card("A100", 312e12, 2.039e12, 19.5e12, 19.5e12),  # SXM, 80 GB
    Card("H100", 989e12, 3.35e12, 67e12, 67e12),  # SXM5, 80 GB
    Card("H200", 989e12, 4.8e12, 67e12, 67e12),  # SXM
    Card("L40S", 362e12, 0.864e12, 91.6e12, 1.43e12),
    Card("RTX 4090", 165e12, 1.008e12, 82.6e12, 1.29e12),
    Card("B200", 2250e12, 8.0e12, 75e12, 37e12),  # HGX
)
# What a copy and a matmul in bf16 reach in practice.
_MEASURED = (Card("H100 measured", 798e12, 3.0e12, 67e12, 67e12),)
CARDS: dict[str, Card] = {card.name: card for card in (*_DATASHEET, *_MEASURED)}


class Cost(NamedTuple):
    """Bytes and FLOPs of one launch that reads each input and writes each output once."""

    bytes: int
    flops: int


def floor(card: Card, *launches: Cost) -> float:
    """The least seconds of ``launches``, one after the other: for each, the longer of moving bytes and computing."""
    return sum(max(cost.bytes / card.bandwidth, cost.flops / card.flops) for cost in launches)


def dense_linear(M: int, N: int, K: int, *, itemsize: int = 2) -> tuple[Cost]:
    """``x @ W.mT``: (M, K) → (M, N), elements of ``itemsize`` bytes."""
    return (Cost((N * K + M * (N + K)) * itemsize, 2 * M * N * K),)


def lowrank_linear(M: int, N: int, K: int, R: int, *, itemsize: int = 2) -> tuple[Cost]:
    """``lowrank_linear`` in one launch; h stays on the chip."""
    return lowrank_linear_grouped(M, K, [(N, R)], itemsize=itemsize)


def lowrank_linear_grouped(M: int, K: int, groups: Sequence[tuple[int, int]], *, itemsize: int = 2) -> tuple[Cost]:
    """``lowrank_linear_grouped`` in one launch that reads x once; ``groups`` has (N, R) of each output."""
    factors = sum(R * (N + K) for N, R in groups)
    outputs = sum(N for N, _ in groups)
    return (Cost((factors + M * (K + outputs)) * itemsize, 2 * M * factors),)


def lowrank_glu(M: int, N: int, K: int, gate_rank: int, up_rank: int, *, itemsize: int = 2) -> tuple[Cost]:
    """``lowrank_glu`` in one launch: h and the two factors of the product stay on the chip."""
    factors = (gate_rank + up_rank) * (N + K)
    return (Cost((factors + M * (K + N)) * itemsize, 2 * M * factors),)


def pivoted(cost: Cost, M: int, ranks: Sequence[int], *, itemsize: int = 2) -> Cost:
    """The cost of low-rank linears in pivoted form: R² fewer parameters each, so R(N + K - R); order is not counted."""
    saved = sum(R * R for R in ranks)
    return Cost(cost.bytes - saved * itemsize, cost.flops - 2 * M * saved)


def singular_value_grad(T: int, N: int, K: int, R: int, *, outputs: int = 1, itemsize: int = 2) -> tuple[Cost]:
    """``singular_value_grad`` in one launch: T tokens, and ``outputs`` rows of (R,) fp32, such as one per sample."""
    return (Cost((T + R) * (N + K) * itemsize + outputs * R * 4, 2 * T * R * (N + K)),)
