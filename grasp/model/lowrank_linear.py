"""The low-rank linear layer, and how a dense weight becomes one."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from grasp.method.svd import SVD, decompose
from grasp.model.dense import DenseLinear, dense_shape, dense_weight, gathered
from grasp.model.families import SHARED_INPUTS
from grasp.model.offload import execution_device, fetched
from grasp_kernels import Factors, lowrank_linear, lowrank_linear_grouped, pack_factors
from grasp_kernels.dispatch import BACKENDS


class InputGroup:
    """Low-rank linears that are given the same input: when the first is called, one op computes all of them.

    The others take their outputs when they are called with that very tensor; called with another, each computes its
    own. It holds no parameters, so ``state_dict`` knows nothing of it. Threads do not see each other's outputs. Without
    gradients it stands aside on a CPU, for there calls one by one are faster.
    """

    def __init__(self, members: Sequence[LowRankLinear]) -> None:
        self.members = list(members)
        self._indices = {id(member): index for index, member in enumerate(self.members)}
        self._waiting: dict[int, _Waiting] = {}  # thread → outputs that were computed and not yet asked for
        self._packed: tuple[object, list[Factors]] | None = None

    def output(self, member: LowRankLinear, x: Tensor) -> Tensor:
        """The output of ``member`` for ``x``: (..., in_features) → (..., out_features)."""
        if len(self.members) == 1:
            return lowrank_linear(x, *self._packed_for(x, [member.factors])[0], backend=member.backend)
        index = self._indices.get(id(member))
        if index is None:  # a replica of a member
            return lowrank_linear(x, *member.factors, backend=member.backend)
        thread = 0 if torch.compiler.is_compiling() else threading.get_ident()
        if index == 0:
            return self._first_of_all(x, thread)
        waiting, own = self._waiting.pop(thread, None), member.factors
        if waiting is None or waiting.x is not x or index not in waiting.outputs:
            return lowrank_linear(x, *own, backend=member.backend)
        output, stamp = waiting.outputs.pop(index)
        if waiting.outputs:
            self._waiting[thread] = waiting
        return output if stamp == _stamp(x, own) else lowrank_linear(x, *own, backend=member.backend)

    def _first_of_all(self, x: Tensor, thread: int) -> Tensor:
        """The first member's output; the others' are kept."""
        factors, backend = [member.factors for member in self.members], self.members[0].backend
        if any(group.U.device != x.device for group in factors):  # an offloaded member comes at its own turn
            return lowrank_linear(x, *factors[0], backend=backend)
        outputs = lowrank_linear_grouped(x, self._packed_for(x, factors), backend=backend)
        rest = zip(outputs[1:], factors[1:], strict=True)
        kept = {index: (output, _stamp(x, group)) for index, (output, group) in enumerate(rest, start=1)}
        self._waiting[thread] = _Waiting(x, kept)
        return outputs[0]

    def _packed_for(self, x: Tensor, factors: list[Factors]) -> list[Factors]:
        """The members' factors; where a GPU kernel reads them and no gradient is taken, packed once for all calls.

        A write that PyTorch does not see, through ``.data`` or under ``inference_mode``, needs ``repack``.
        """
        if not x.is_cuda or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return factors
        tensors = [tensor for group in factors for tensor in group if tensor is not None]
        stamp = [(t.data_ptr(), tuple(t.shape), t.dtype, _version(t)) for t in tensors]
        packed = self._packed
        if packed is None or packed[0] != stamp:
            packed = self._packed = (stamp, pack_factors(factors))
        return packed[1]

    def repack(self) -> None:
        """Forget the packed factors: the next call packs the members' parameters again."""
        self._packed = None

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        """A copy's members are the copies, without outputs in flight and without packed factors."""
        group = InputGroup([])
        memo[id(self)] = group
        group.__init__([copy.deepcopy(member, memo) for member in self.members])  # type: ignore[misc]
        return group

    def __reduce__(self) -> tuple[type[InputGroup], tuple[list[LowRankLinear]]]:
        return InputGroup, (self.members,)


class _Waiting(NamedTuple):
    x: Tensor
    outputs: dict[int, tuple[Tensor, object]]  # by member, with the stamp under which it was computed


def _stamp(x: Tensor, factors: Factors) -> object:
    """What must not change between the call of a group's first member and that of another."""
    if torch.compiler.is_compiling():
        return None  # a graph's inputs do not change while it runs
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return torch.is_grad_enabled(), autocast, _version(x), [_version(t) for t in factors if t is not None]


def _version(tensor: Tensor) -> int:
    """Changes with every write to a tensor that PyTorch sees; writes to inference tensors it does not see."""
    return -1 if tensor.is_inference() else tensor._version


def _one_by_one(x: Tensor) -> bool:
    """Whether one op for a whole group would save less than it costs to hand out its outputs, as on a CPU."""
    return x.is_cpu and not torch.is_grad_enabled() and not torch.compiler.is_compiling()


def group_linears_(model: nn.Module, enabled: bool = True) -> list[tuple[str, ...]]:
    """Let low-rank linears that share an input be computed by one op; results and ``state_dict`` do not change.

    Args:
        model: any module; its low-rank linears are regrouped from scratch.
        enabled: ``False`` takes all groups apart.

    Returns:
        The groups, as the paths of their members.
    """
    groups: list[tuple[str, ...]] = []
    for path, parent in list(model.named_modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LowRankLinear)}
        for child in children.values():
            child.group = InputGroup([child])
        for names in SHARED_INPUTS:
            members = {name: children[name] for name in names if name in children}
            if enabled and len(members) > 1:
                group = InputGroup(list(members.values()))
                for member in members.values():
                    member.group = group
                groups.append(tuple(f"{path}.{name}".lstrip(".") for name in members))
    return groups


def set_backend_(model: nn.Module, backend: str) -> None:
    """Let all low-rank linears of a model run on one backend; calls that it does not run raise. ``"auto"`` undoes it.

    Raises:
        ValueError: if there is no such backend.
    """
    if backend not in (known := ["auto", *(row.name for row in BACKENDS)]):
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(known)}")
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.backend = backend


def _balanced(svd: SVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and Vh with the singular values in them, each group's column as long as its row, in whichever basis they are.

    But fp16 overflows at 65504, and x @ Vh.mT is stored in it: there the rows are of length 1.
    """
    tiny = torch.finfo(svd.S.dtype).tiny
    columns = torch.linalg.vector_norm(svd.U, dim=0).clamp_min(tiny)
    rows = torch.linalg.vector_norm(svd.Vh, dim=1).clamp_min(tiny)
    length = svd.S * columns * rows
    right = torch.ones_like(length) if dtype == torch.float16 else length.sqrt()
    return svd.U * (length / right / columns), svd.Vh * (right / rows)[:, None]


class LowRankLinear(nn.Module):
    """A linear layer of rank R: ``y = (x @ Vh.mT) @ U.mT + bias``, the singular values folded into both factors
    (in fp16 into U alone).

    Parameters are U (N, R), Vh (R, K) and bias (N,) or ``None``; they share one dtype.
    """

    U: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None
    backend = "auto"  # of the ops; see ``set_backend_``
    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism: give the op this process's part, no DTensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= rank <= min(in_features, out_features):
            raise ValueError(
                f"rank must be between 1 and {min(in_features, out_features)} for a linear of "
                f"{in_features} inputs and {out_features} outputs, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features, rank, device=device, dtype=dtype))
        self.Vh = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.group = InputGroup([self])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Random factors, such that ``U @ Vh`` has the variance of a freshly made ``nn.Linear``."""
        nn.init.normal_(self.U, std=self.rank**-0.5)
        nn.init.normal_(self.Vh, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def from_dense(cls, linear: DenseLinear, indices: Tensor, svd: SVD | None = None) -> LowRankLinear:
        """Keep the singular groups ``indices`` of a dense linear.

        Args:
            linear: an ``nn.Linear`` or GPT-2's ``Conv1D``.
            indices: (R,) int64, which groups are kept, 0 being the one with the largest singular value.
            svd: the weight's decomposition where the caller has it; otherwise computed here.

        Raises:
            ValueError: if ``indices`` is empty, out of range or has duplicates.
            NonFiniteError: if the weight has NaN or infinite entries.
        """
        n, k = dense_shape(linear)
        groups = min(n, k)
        picked = indices.tolist()
        if not picked or min(picked) < 0 or max(picked) >= groups or len(set(picked)) < len(picked):
            raise ValueError(f"indices must be distinct, at least one, each in 0..{groups - 1}; got {picked}")
        U, S, Vh = decompose(dense_weight(linear)) if svd is None else svd
        indices = indices.to(S.device)
        dtype, device = linear.weight.dtype, execution_device(linear)
        module = cls(k, n, len(picked), bias=linear.bias is not None, device=device, dtype=dtype)
        with torch.no_grad():
            left, right = _balanced(SVD(U[:, indices], S[indices], Vh[indices]), dtype)
            module.U.copy_(left)
            module.Vh.copy_(right)
            if module.bias is not None:
                module.bias.copy_(gathered(fetched(linear, "bias")))
        module.train(linear.training)
        return module

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        own = self._parameters  # as attributes they cost a microsecond more
        if len(own) == 3 and _one_by_one(x):  # with a parametrization there are fewer
            return lowrank_linear(x, own["U"], None, own["Vh"], own["bias"], backend=self.backend)  # type: ignore[arg-type]
        return self.group.output(self, x)

    @property
    def factors(self) -> Factors:
        """The parameters as the ops take them."""
        return Factors(self.U, None, self.Vh, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight this layer stands for, (out_features, in_features) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        return self.U.to(dtype) @ self.Vh.to(dtype)

    def extra_repr(self) -> str:
        """Shape, rank, and the share of the dense weight's parameters that is left."""
        dense = self.in_features * self.out_features
        share = self.rank * (self.in_features + self.out_features) / dense
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, parameters={share:.1%} of dense"
        )
