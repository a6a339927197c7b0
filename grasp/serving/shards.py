"""Which rows and columns of a checkpoint's linears one process of a tensor-parallel group holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import CheckpointError, UnsupportedModelError

_SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names of the parts of a merged qkv; those of others are numbers


class Piece(NamedTuple):
    """Part ``number`` of a dimension that is cut into ``total`` equal ones."""

    number: int
    total: int


WHOLE = Piece(0, 1)


class Part(NamedTuple):
    """A linear of the checkpoint, as one process holds it inside a linear that serves one or several of them."""

    name: str
    rank: int | None  # of a low-rank one
    widths: tuple[int, ...]  # rows that are held; several where the checkpoint itself has q, k and v in one
    pieces: tuple[Piece, ...]  # for each width, which of the checkpoint's rows those are

    @property
    def rows(self) -> int:
        """Rows that are held."""
        return sum(self.widths)

    @property
    def checkpoint_rows(self) -> int:
        """Rows in the checkpoint."""
        return sum(width * piece.total for width, piece in zip(self.widths, self.pieces, strict=True))


def linear_names(path: str, packed: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """What the checkpoint calls the linears that a module of the serving stack stands for, in the module's order.

    Args:
        path: of the module, such as ``model.layers.0.self_attn.qkv_proj``.
        packed: the last name of a merged module → those of its linears.
    """
    parent, dot, name = path.rpartition(".")
    return tuple(f"{parent}{dot}{each}" for each in packed.get(name, [name]))


def output_pieces(count: int, rank: int, processes: int, kv_replicas: int = 1) -> tuple[Piece, ...]:
    """The rows that a column-parallel linear of ``count`` outputs takes in process ``rank``, one piece per output.

    Args:
        count: outputs side by side, such as 3 of q, k and v.
        rank: this process's number in the group.
        processes: of the group.
        kv_replicas: processes that share a head of keys and values, all but the first output being such; 1 where
            there are at least as many heads as processes.
    """
    shared = Piece(rank // kv_replicas, processes // kv_replicas)
    return (Piece(rank, processes), *[shared] * (count - 1))


def merged_parts(
    names: Sequence[str], ranks: Mapping[str, int], widths: Sequence[int], pieces: Sequence[Piece]
) -> tuple[Part, ...]:
    """The linears of a merged module: each has one output, or one linear has them all.

    Args:
        names: of the linears in the checkpoint.
        ranks: of those that are low-rank.
        widths: rows that this process holds of each output.
        pieces: which rows of the output those are.

    Raises:
        UnsupportedModelError: if outputs and linears are not as many.
    """
    if len(names) == 1:
        return (Part(names[0], ranks.get(names[0]), tuple(widths), tuple(pieces)),)
    if len(names) != len(widths):
        raise UnsupportedModelError(
            f"{', '.join(names)} are {len(names)} linears, the module that merges them has {len(widths)} outputs; "
            "expected as many. This architecture cannot be served compressed: dequantize the model and save it dense."
        )
    triples = zip(names, widths, pieces, strict=True)
    return tuple(Part(name, ranks.get(name), (width,), (piece,)) for name, width, piece in triples)


def part_index(shard: object, parts: Sequence[Part]) -> int:
    """The part that a shard's name or number means; ``None`` where there is but one.

    Raises:
        UnsupportedModelError: if it means none.
    """
    index = 0 if shard is None and len(parts) == 1 else _SHARDS.get(shard, shard) if isinstance(shard, str) else shard
    if type(index) is not int or not 0 <= index < len(parts):
        raise UnsupportedModelError(
            f"a tensor is meant for shard {shard!r} of {', '.join(part.name for part in parts)}; expected one of them. "
            "This architecture cannot be served compressed: dequantize the model and save it dense."
        )
    return index


def own_rows(tensor: Tensor, part: Part) -> Tensor:
    """The rows of a (checkpoint_rows, ...) tensor that this process holds: (rows, ...)."""
    taken, start = [], 0
    for width, piece in zip(part.widths, part.pieces, strict=True):
        taken.append(tensor.narrow(0, start + piece.number * width, width))
        start += width * piece.total
    return taken[0] if len(taken) == 1 else torch.cat(taken)


def own_columns(tensor: Tensor, width: int, piece: Piece) -> Tensor:
    """The ``width`` columns of a (..., width * total) tensor that this process holds."""
    return tensor.narrow(-1, piece.number * width, width)


def check_shape(name: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    """Refuse a tensor of the checkpoint that is not what the architecture and the ranks call for.

    Raises:
        CheckpointError: with both shapes.
    """
    if tuple(tensor.shape) != expected:
        raise CheckpointError(
            f"{name} has the shape {tuple(tensor.shape)}, config.json calls for {expected}; the two do not belong "
            "together: save the model again"
        )
