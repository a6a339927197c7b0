"""The linears of a checkpoint in a module of the serving stack, and the rows that one process has of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import UnsupportedModelError
from grasp.method.storage import Storage

_SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the linears of a merged qkv; other shards have numbers


class Piece(NamedTuple):
    """Piece ``number`` of a dimension that is cut into ``total`` equal pieces."""

    number: int
    total: int


WHOLE = Piece(0, 1)


class LocalLinear(NamedTuple):
    """The part of a linear of the checkpoint that one process has."""

    name: str  # of the linear in the checkpoint
    rank: int | None  # ``None`` if the linear is dense
    # local rows of each output; there are several if the checkpoint has q, k and v in one linear
    widths: tuple[int, ...]
    pieces: tuple[Piece, ...]  # for each output, the piece of the checkpoint's rows that is local
    pivoted: bool = False  # the factors in the checkpoint are pivoted
    storage: Storage | None = None  # of its factors or its weight; ``None`` if they are floating

    @property
    def rows(self) -> int:
        """Local rows."""
        return sum(self.widths)

    @property
    def checkpoint_rows(self) -> int:
        """Rows in the checkpoint."""
        return sum(width * piece.total for width, piece in zip(self.widths, self.pieces, strict=True))

    @property
    def keeps_pivots(self) -> bool:
        """Whether the local factors are pivoted: those of a process that has some of the rows are not."""
        return self.pivoted and self.rows == self.checkpoint_rows


def linear_names(path: str, packed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The checkpoint's names of the linears in a module of the serving stack, in the order of the module.

    Args:
        path: of the module, such as ``model.layers.0.self_attn.qkv_proj``.
        packed: the last name of a merged module → the last names of its linears.
    """
    parent, dot, module = path.rpartition(".")
    return tuple(f"{parent}{dot}{name}" for name in packed.get(module, [module]))


def output_pieces(count: int, rank: int, processes: int, kv_replicas: int = 1) -> tuple[Piece, ...]:
    """The rows of each output of a column-parallel linear that process ``rank`` has.

    Args:
        count: number of outputs, such as 3 for q, k and v.
        rank: number of the process in the group.
        processes: size of the group.
        kv_replicas: number of processes that have the same heads of keys and values, which are all outputs but the
            first; 1 if there are at least as many heads as processes.
    """
    shared = Piece(rank // kv_replicas, processes // kv_replicas)
    return (Piece(rank, processes), *[shared] * (count - 1))


def merged_linears(
    names: Sequence[str],
    ranks: Mapping[str, int],
    widths: Sequence[int],
    pieces: Sequence[Piece],
    pivoted: Collection[str] = (),
    storages: Mapping[str, Storage] = MappingProxyType({}),
) -> tuple[LocalLinear, ...]:
    """The linears of a merged module: one per output, or one for all outputs.

    Args:
        names: of the linears in the checkpoint.
        ranks: of the low-rank linears.
        widths: local rows of each output.
        pieces: the piece of each output's rows that is local.
        pivoted: names of the low-rank linears whose factors are pivoted.
        storages: of the quantised linears.

    Raises:
        UnsupportedModelError: if there are several linears and their number differs from that of the outputs, or some
            have floating and others quantised tensors.
    """
    if len({name in storages for name in names}) > 1:
        stored = ", ".join(f"{name} {storages.get(name, 'floating')}" for name in names)
        raise UnsupportedModelError(
            f"a module merges floating and quantised linears ({stored}); expected one kind. Quantise all of them, as "
            "`grasp quantize` does"
        )
    outputs = [([width], [piece]) for width, piece in zip(widths, pieces, strict=True)]
    if len(names) == 1:
        outputs = [(list(widths), list(pieces))]
    if len(names) != len(outputs):
        raise UnsupportedModelError(
            f"{', '.join(names)} are {len(names)} linears, but the module that merges them has {len(widths)} outputs; "
            "expected one linear per output. This architecture cannot be served compressed: dequantize the model and "
            "save it dense."
        )
    return tuple(
        LocalLinear(name, ranks.get(name), tuple(own), tuple(local), name in pivoted, storages.get(name))
        for name, (own, local) in zip(names, outputs, strict=True)
    )


def local_size(size: int, piece: Piece, names: Sequence[str]) -> int:
    """The size of a piece of a dimension.

    Raises:
        UnsupportedModelError: if the pieces are not equal.
    """
    if size % piece.total:
        raise UnsupportedModelError(
            f"{', '.join(names)} cannot be split over {piece.total} processes: config.json gives them {size} channels; "
            "expected a multiple. Serve the model with fewer processes."
        )
    return size // piece.total


def linear_index(shard: object, linears: Sequence[LocalLinear]) -> int:
    """The index of the linear that a shard's name or number selects; ``None`` selects the only linear.

    Raises:
        UnsupportedModelError: if the shard selects no linear.
    """
    index = 0 if shard is None and len(linears) == 1 else _SHARDS.get(shard, shard) if isinstance(shard, str) else shard
    if type(index) is not int or not 0 <= index < len(linears):
        raise UnsupportedModelError(
            f"a tensor is for shard {shard!r} of {', '.join(linear.name for linear in linears)}; expected one of them. "
            "This architecture cannot be served compressed: dequantize the model and save it dense."
        )
    return index


def local_rows(tensor: Tensor, linear: LocalLinear) -> Tensor:
    """The local rows of a (checkpoint_rows, ...) tensor: (rows, ...)."""
    parts, start = [], 0
    for width, piece in zip(linear.widths, linear.pieces, strict=True):
        parts.append(tensor.narrow(0, start + piece.number * width, width))
        start += width * piece.total
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def local_columns(tensor: Tensor, width: int, piece: Piece) -> Tensor:
    """The ``width`` local columns of a (..., width * total) tensor."""
    return tensor.narrow(-1, piece.number * width, width)
