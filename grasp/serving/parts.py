"""The tensors of a part of a linear: those of the checkpoint, and those that one process makes of them.

A part is low-rank or dense, floating or quantised. A matrix is one tensor, or, if it is quantised, values and scales.
``MATRICES`` says which matrices have outputs as rows and inputs as columns. Everything else follows from that: in a
column-parallel linear a process has some outputs, in a row-parallel one some inputs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from grasp.errors import CheckpointError, UnsupportedModelError
from grasp.method.pivoting import factored, in_order
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import order_objection
from grasp.model.quantized_linear import VALUES
from grasp.serving.shards import LocalLinear, Piece, local_columns, local_rows
from grasp_kernels.quantized import GROUPS, pack_int4, unpack_int4


class Matrix(NamedTuple):
    """The axes of a matrix that processes share out."""

    outputs: bool  # its rows are outputs of the linear
    inputs: bool  # its columns are inputs of the linear


MATRICES = {"U": Matrix(True, False), "Vh": Matrix(False, True), "weight": Matrix(True, True)}
# The names that tensors of linears have in checkpoints and in memory. The scales (rows, groups) follow their matrix.
NAMES = (*(f"{name}{suffix}" for name in MATRICES for suffix in ("", "_scales")), "order")


class Spec(NamedTuple):
    """The shape and the dtype of a tensor; ``None`` is any floating-point dtype, in memory that of the model."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None

    @property
    def numel(self) -> int:
        """Entries."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Part:
    """A linear of the checkpoint, of which one process has some rows or columns.

    A process keeps pivoted factors if it has all rows; else it expands them to U (N, R), exactly, also quantised. If a
    piece of a floating weight has fewer numbers than its factors, the process has that piece. A quantised weight may be
    the Vh of pivoted factors of full rank, whose U has no rows and is not held: the kernels of the CPU take them.
    """

    linear: LocalLinear  # name, rank, form, storage and local rows
    width: int  # local columns
    columns: Piece  # the piece of the columns that is local
    weight_as_factors: bool = False  # a quantised weight is held as factors
    rank_multiple: int = 1  # ranks of floating factors that are not pivoted are padded to it

    @property
    def low_rank(self) -> bool:
        """Whether the checkpoint has factors, and the process too."""
        return self.linear.rank is not None and "Vh" in self.held

    @property
    def in_features(self) -> int:
        """Columns of the weight in the checkpoint."""
        return self.width * self.columns.total

    @cached_property
    def stored(self) -> dict[str, Spec]:
        """The tensors that the checkpoint must have."""
        linear = self.linear
        shape = (linear.checkpoint_rows, self.in_features)
        return _specs(*shape, linear.rank or 0, linear.pivoted, linear.storage, linear.storage)

    @cached_property
    def held(self) -> dict[str, Spec]:
        """The tensors in the memory of the process.

        Raises:
            UnsupportedModelError: if the columns of a quantised matrix cannot be cut at the borders of processes.
        """
        linear, width = self.linear, self.width
        rank, pivoted = linear.rank or 0, linear.keeps_pivots
        if linear.storage is not None and not rank and self.weight_as_factors:
            order = Spec((linear.rows,), torch.int32)
            return {**_matrix("Vh", linear.rows, width, self.local_storage), "order": order}
        if linear.storage is None and rank:
            split = linear.rows < linear.checkpoint_rows or self.columns.total > 1
            # Each process has one factor whole, so a piece of the factors can have more numbers than one of the weight.
            if split and (linear.rows - rank * pivoted + width) * rank >= linear.rows * width:
                rank, pivoted = 0, False
            elif not pivoted:
                rank = -(-rank // self.rank_multiple) * self.rank_multiple
        return _specs(linear.rows, width, rank, pivoted, linear.storage, self.local_storage)

    @cached_property
    def local_storage(self) -> Storage | None:
        """The storage of a matrix whose columns are inputs: one scale may stand for fewer columns than before."""
        storage = self.linear.storage
        if storage is None or self.columns.total == 1:
            return storage
        one_scale = storage.group is None or self.in_features <= storage.group
        sizes = [size for size in GROUPS if storage.group and storage.group % size == 0 and self.width % size == 0]
        if (storage.bits == 4 and self.width % 2) or not (one_scale or sizes):
            raise UnsupportedModelError(
                f"{self.linear.name} is stored as {storage}, and each of {self.columns.total} processes has "
                f"{self.width} of its columns; expected a multiple of {2 if one_scale else GROUPS[0]}. Use another "
                "number of processes, or `grasp quantize --bits 8`"
            )
        return storage._replace(group=None if one_scale else sizes[-1])

    def check(self, name: str, tensor: Tensor) -> None:
        """Check a tensor of the checkpoint.

        Raises:
            CheckpointError: if the part has no such tensor, or one of another shape or dtype, or it is an ``order``
                with which kernels would write outside of an output.
        """
        if name not in self.stored:
            raise CheckpointError(f"the checkpoint has {self._objection(name)}; save the model again")
        check_tensor(f"{self.linear.name}.{name}", tensor, self.stored[name])
        if name == "order" and (objection := order_objection(tensor, self.linear.rank or 0, len(tensor))):
            raise CheckpointError(
                f"{self.linear.name}.{objection}; the file is damaged, or the server reorders the rows of this "
                "architecture: convert the checkpoint with `grasp convert --to factored`"
            )

    def _objection(self, name: str) -> str:
        linear, path = self.linear, f"{self.linear.name}.{name}"
        if name.removesuffix("_scales") in self.stored:
            return f"{path}, but quantized in config.json does not name {linear.name}"
        if linear.rank is None:
            return f"the factor {path}, but config.json has no rank for it"
        if name == "order":
            return f"{path}, but pivoted in config.json does not name {linear.name}"
        return f"a dense {path}, but config.json the rank {linear.rank} for it"

    def make(self, tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
        """The tensors ``held``, without padding.

        Args:
            tensors: ``stored``, checked.
            device: where factors are multiplied.
        """
        made, pivoted = dict(tensors), self.linear.pivoted and "order" in self.held
        if "order" in made and not pivoted:
            made |= _without_pivots(made, made.pop("order"), self.linear.rank or 0)
        for name in made.keys() - {"order"}:
            matrix = MATRICES[name.removesuffix("_scales")]
            if matrix.outputs and not pivoted:
                made[name] = local_rows(made[name], self.linear)
            if matrix.inputs and self.columns.total > 1:
                made[name] = self._local_columns(made[name], scales=name.endswith("_scales"))
        if "weight" in made and "Vh" in self.held:
            made = {name.replace("weight", "Vh"): tensor for name, tensor in made.items()}
            made["order"] = torch.arange(self.linear.rows, dtype=torch.int32)
        if "Vh" in made and "weight" in self.held:
            U, Vh = (made[name].to(device, torch.float32) for name in ("U", "Vh"))
            made = {"weight": U @ Vh}
        return made

    def _local_columns(self, tensor: Tensor, scales: bool) -> Tensor:
        """The local columns of a matrix or of its scales; see ``local_storage``."""
        storage, local = self.linear.storage, self.local_storage
        if not scales:
            return local_columns(tensor, self.width if storage is None else storage.columns(self.width), self.columns)
        if local is None or local.group is None:
            return tensor
        assert storage is not None
        assert storage.group is not None
        finer = tensor.repeat_interleave(storage.group // local.group, dim=1)
        return local_columns(finer, self.width // local.group, self.columns)


def check_tensor(path: str, tensor: Tensor, spec: Spec) -> None:
    """Check the shape and the dtype of a tensor of the checkpoint.

    Raises:
        CheckpointError: if they are not those of ``spec``.
    """
    if tuple(tensor.shape) != spec.shape:
        raise CheckpointError(
            f"{path} has the shape {tuple(tensor.shape)}, config.json requires {spec.shape}; save the model again"
        )
    if tensor.dtype != spec.dtype and not (spec.dtype is None and tensor.is_floating_point()):
        expected = spec.dtype or "a floating-point one"
        raise CheckpointError(f"{path} has the dtype {tensor.dtype}; expected {expected}. Save the model again")


def _specs(
    rows: int, columns: int, rank: int, pivoted: bool, left: Storage | None, right: Storage | None
) -> dict[str, Spec]:
    """The tensors of a linear; it is dense if the rank is 0. ``left`` is the storage of U, ``right`` of the others."""
    if not rank:
        return _matrix("weight", rows, columns, right)
    specs = {**_matrix("U", rows - rank * pivoted, rank, left), **_matrix("Vh", rank, columns, right)}
    return {**specs, "order": Spec((rows,), torch.int32)} if pivoted else specs


def _matrix(name: str, rows: int, columns: int, storage: Storage | None) -> dict[str, Spec]:
    if storage is None:
        return {name: Spec((rows, columns))}
    values = Spec((rows, storage.columns(columns)), VALUES[storage.dtype])
    return {name: values, f"{name}_scales": Spec((rows, storage.scales(columns)))}


def _without_pivots(tensors: Mapping[str, Tensor], order: Tensor, rank: int) -> dict[str, Tensor]:
    """U (N, R), and its scales if it is quantised: rows of the identity, with scales of 1, are among those of U."""
    U, scales = tensors["U"], tensors.get("U_scales")
    if scales is None:
        return {"U": factored(U, order)}
    whole = unpack_int4(U, rank) if U.dtype == torch.uint8 else U.float()  # PyTorch copies no rows of fp8
    expanded = factored(whole, order)
    ones = scales.new_ones(rank, scales.shape[1])
    return {
        "U": pack_int4(expanded) if U.dtype == torch.uint8 else expanded.to(U.dtype),
        "U_scales": in_order(torch.cat([ones, scales]), order),
    }
