"""Low-rank linears that take the same input: one op computes them, and one memory holds their factors."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Sequence
from operator import is_
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from grasp.model.offload import is_fetched_per_call
from grasp_kernels import Factors, lowrank_linear, lowrank_linear_grouped
from grasp_kernels.packing import close_columns, has_padding, may_pad, packed_memory, pad_columns, stack_rows, stacked

if TYPE_CHECKING:
    from grasp.model.lowrank_linear import LowRankLinear


class InputGroup:
    """Low-rank linears that take the same input: the call of the first one computes all of them with one op.

    The other members return the stored outputs if they are called with the same tensor object; otherwise each member
    computes its own output. The group has no parameters and does not appear in ``state_dict``. Each thread has its own
    stored outputs. The group is not used on a CPU without gradients, where separate calls are faster.

    A layer holds its group. The group does not keep a layer alive; after a member is gone, the others compute alone.

    Args:
        members: layers with one number of inputs.
        packs: ``pack_`` moves the factors to packed memory.
    """

    def __init__(self, members: Sequence[LowRankLinear], packs: bool = False) -> None:
        self._members = [weakref.ref(member) for member in members]
        self._pending: dict[int, _PendingOutputs] = {}  # by thread
        self._packs = packs

    @property
    def members(self) -> list[LowRankLinear]:
        """The living members, in order."""
        members = [ref() for ref in self._members]
        return [member for member in members if member is not None]

    def output(self, member: LowRankLinear, x: Tensor) -> Tensor:
        """The output of ``member`` for ``x``: (..., in_features) → (..., out_features)."""
        if len(self._members) == 1:
            return lowrank_linear(x, *member.factors, backend=member.backend)
        members = self.members
        index = next((i for i, other in enumerate(members) if other is member), None)
        if index is None or len(members) < len(self._members):  # a replica of a member, or one is gone
            return lowrank_linear(x, *member.factors, backend=member.backend)
        thread = 0 if is_compiling() else threading.get_ident()
        if index == 0:
            return self._compute_all(members, x, thread)
        pending, factors = self._pending.pop(thread, None), member.factors
        if pending is None or pending.x is not x or index not in pending.outputs:
            return lowrank_linear(x, *factors, backend=member.backend)
        output, used, stamp = pending.outputs.pop(index)
        if pending.outputs:
            self._pending[thread] = pending
        is_valid = (is_compiling() or all(map(is_, used, factors))) and stamp == _stamp(x, factors)
        return output if is_valid else lowrank_linear(x, *factors, backend=member.backend)

    def _compute_all(self, members: list[LowRankLinear], x: Tensor, thread: int) -> Tensor:
        """Compute all members, store the outputs of the others, and return that of the first."""
        factors, backend = [member.factors for member in members], members[0].backend
        # A member was offloaded, or given another backend, after it was grouped.
        if any(m.U.device != x.device or m.backend != backend for m in members):
            return lowrank_linear(x, *factors[0], backend=backend)
        outputs = lowrank_linear_grouped(x, factors, backend=backend)
        others = zip(outputs[1:], factors[1:], strict=True)
        pending = {index: (output, group, _stamp(x, group)) for index, (output, group) in enumerate(others, start=1)}
        self._pending[thread] = _PendingOutputs(x, pending)
        return outputs[0]

    def pack_(self) -> None:
        """Move the factors of a group that packs to memory that GPU kernels read fastest, as ``group_linears_`` says.

        No-op if they are there already, and where they are not moved: on a CPU, or if a factor is fetched for each call
        or is not an ordinary parameter. A layer calls this after its factors have moved or are new.
        """
        members = self.members
        if not self._packs or len(members) < len(self._members) or not all(map(_is_packable, members)):
            return
        Vhs = [member.Vh for member in members]
        if len({(Vh.shape[1], Vh.dtype, Vh.device) for Vh in Vhs}) > 1:  # in the middle of a move
            return
        with torch.inference_mode(False), torch.no_grad():
            if not _is_stacked(Vhs):
                for Vh, rows in zip(Vhs, stack_rows(Vhs), strict=True):
                    Vh.data = rows
            for member in members:
                if packed_memory(member.U, 1) is None:
                    member.U.data = close_columns(member.U)
                place_columns(member)

    def unpack_(self) -> None:
        """Give each factor that lies in packed memory a memory of its own, contiguous."""
        self._packs = False
        with torch.inference_mode(False), torch.no_grad():
            for member in filter(_is_movable, self.members):
                for factor in (member.U, member.Vh):
                    if has_padding(factor) or not factor.is_contiguous():
                        factor.data = factor.clone(memory_format=torch.contiguous_format)

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        """A group of the copied members, without stored outputs; the copies are contiguous until ``pack_``."""
        group = InputGroup([])
        memo[id(self)] = group
        members = [copy.deepcopy(member, memo) for member in self.members]
        group.__init__(members, self._packs)  # type: ignore[misc]
        return group

    def __reduce__(self) -> tuple[type[InputGroup], tuple[list[LowRankLinear], bool]]:
        return InputGroup, (self.members, self._packs)


class _PendingOutputs(NamedTuple):
    """Outputs for ``x`` that were computed and not yet returned."""

    x: Tensor
    outputs: dict[int, tuple[Tensor, Factors, object]]  # index of the member → its output, of which factors, and stamp


def _stamp(x: Tensor, factors: Factors) -> object:
    """Equal in two calls of a group if an output computed in the first is valid in the second, of the same factors."""
    if is_compiling():
        return None  # the inputs of a graph do not change while it runs; writes between two graphs are not seen
    device = x.device.type
    casts = not x.is_meta and torch.is_autocast_enabled(device)
    tensors = [x, *(factor for factor in factors if factor is not None)]
    differentiable = is_grad_enabled() and [tensor.requires_grad for tensor in tensors]
    return differentiable, casts and torch.get_autocast_dtype(device), [_version(tensor) for tensor in tensors]


def _version(tensor: Tensor) -> int:
    """A number that changes with every write that PyTorch counts; it does not count writes to inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def place_columns(layer: LowRankLinear) -> None:
    """Pad the rows of U, or close them while it is trained: fused optimizers and FSDP2 need contiguous parameters.

    U is not moved if it is not packed, or if a library has moved it, such as one that trains all parameters as one.
    """
    U = layer._parameters.get("U")
    if type(U) is not nn.Parameter or U.is_inference():
        return
    trained = layer.training and U.requires_grad
    with torch.inference_mode(False), torch.no_grad():
        if trained and has_padding(U):
            U.data = close_columns(U)
        elif not trained and packed_memory(U, 1) is None and may_pad(U):
            U.data = pad_columns(U)


def _is_movable(layer: LowRankLinear) -> bool:
    """Whether the factors are ordinary parameters, which stay on their device between calls."""
    factors = [layer._parameters.get("U"), layer._parameters.get("Vh")]  # a parametrization leaves fewer
    return not is_fetched_per_call(layer) and all(
        type(factor) is nn.Parameter and factor.dim() == 2 and not factor.is_inference() for factor in factors
    )


def _is_packable(layer: LowRankLinear) -> bool:
    """Whether ``pack_`` moves the factors of a layer."""
    return _is_movable(layer) and _gains_by_packing(layer.U) and _gains_by_packing(layer.Vh)


def _gains_by_packing(factor: Tensor) -> bool:
    """Whether the kernels for the factor's device read packed memory faster: on a GPU."""
    return factor.is_cuda


def _is_stacked(Vhs: Sequence[Tensor]) -> bool:
    """Whether the Vh of a group, each with its padding, lie one behind the other."""
    memories = [memory for Vh in Vhs if (memory := packed_memory(Vh, 0)) is not None]
    return len(memories) == len(Vhs) and stacked(memories) is not None
