"""How the values of a quantised matrix are stored."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_GROUPS = (None, 32, 64, 128)
_DEFAULT_GROUP = 64  # of 4 bits


class Storage(NamedTuple):
    """How values of a matrix are stored; as text ``"int8"``, ``"int4"``, ``"fp8"`` or, with groups, ``"int4/64"``."""

    bits: int  # 8 or 4 per value
    group: int | None = None  # columns with one scale; ``None``: a row has one scale
    kind: str = "int"  # ``"int"``, or ``"fp"`` for 8 bits of float8_e4m3fn

    def __str__(self) -> str:
        return self.numbers + (f"/{self.group}" if self.group else "")

    @property
    def numbers(self) -> str:
        """``"int8"``, ``"int4"`` or ``"fp8"``, as kernels tell them apart."""
        return f"{self.kind}{self.bits}"

    @property
    def option(self) -> int | str:
        """What ``--bits`` and ``choose_storage`` take for it: 8, 4 or ``"fp8"``."""
        return str(self) if self.kind == "fp" else self.bits

    @property
    def dtype(self) -> str:
        """The dtype of the values in a file; a U8 has two values of 4 bits."""
        return {("int", 8): "I8", ("int", 4): "U8", ("fp", 8): "F8_E4M3"}[self.kind, self.bits]

    def columns(self, depth: int) -> int:
        """The stored columns of a matrix with ``depth`` columns."""
        return -(-depth * self.bits // 8)

    def bytes(self, rows: int, depth: int, itemsize: int) -> int:
        """The bytes of a matrix with its scales, ``itemsize`` bytes each."""
        return rows * (self.columns(depth) + itemsize * self.scales(depth))

    def scales(self, depth: int) -> int:
        """The number of scales in a row of ``depth`` columns."""
        return 1 if self.group is None else -(-depth // self.group)


FP8 = Storage(8, kind="fp")
STORAGES = {str(storage): storage for bits in (8, 4) for group in _GROUPS for storage in [Storage(bits, group)]}
STORAGES[str(FP8)] = FP8
FLOATING = "floating"
OUTPUTS = Storage(8)  # of embeddings and of the output layer


def format_storages(names: Sequence[str]) -> str | None:
    """The storages of some linears, ``""`` for a floating one, as a text: that of all, or of each, joined by ``+``.

    Example:
        >>> format_storages(["int8", ""])
        'int8+floating'
    """
    if not any(names):
        return None
    return "+".join(name or FLOATING for name in (names if len(set(names)) > 1 else names[:1]))


def parse_storages(text: str | None, count: int) -> tuple[Storage | None, ...]:
    """The storage of each of ``count`` linears, of a text of ``format_storages``.

    Raises:
        ValueError: if the text has another form.
    """
    known, names = {FLOATING: None, **STORAGES}, (text or FLOATING).split("+")
    if len(names) not in (1, count) or not known.keys() >= set(names):
        raise ValueError(f"weights {text!r} are none of {', '.join(known)}, or one of them for each of {count} linears")
    return tuple(known[name] for name in names * (count // len(names)))


def matrix_bytes(shapes: Iterable[tuple[int, int]], storage: Storage | None, itemsize: int) -> int:
    """The bytes of matrices (rows, depth) with their scales, numbers of ``itemsize`` bytes; ``None``: floating."""
    return sum(n * k * itemsize if storage is None else storage.bytes(n, k, itemsize) for n, k in shapes)


def choose_storage(bits: int | str, group: int | None = None) -> Storage:
    """The storage of ``--bits`` and ``--group``: 8 bits have one scale per row, 4 bits one per 64 columns.

    Args:
        bits: 8, 4 or ``"fp8"``.
        group: of 4 bits; ``None``: 64.

    Raises:
        ValueError: if no backend serves the bits, or the group is impossible.

    Example:
        >>> choose_storage(4)
        Storage(bits=4, group=64, kind='int')
    """
    if bits not in (8, 4, str(FP8)):
        raise ValueError(f"bits must be 8, 4 or {FP8}, got {bits}: no backend has a kernel for others")
    if bits != 4 and group is not None:
        raise ValueError(
            f"group is an option of 4 bits, got {group} with {bits}, which has one scale per row; leave it out"
        )
    if group not in _GROUPS:
        raise ValueError(f"group must be 32, 64 or 128, got {group}")
    if isinstance(bits, str):
        return FP8
    return Storage(bits, (group or _DEFAULT_GROUP) if bits == 4 else None)
