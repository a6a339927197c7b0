"""The low-rank linear layer, and groups of such layers that one op computes."""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from grasp.method.svd import SVD, decompose
from grasp.model.dense import DenseLinear, dense_shape, dense_weight, gathered
from grasp.model.families import family_of
from grasp.model.offload import execution_device, fetched, is_fetched_per_call
from grasp_kernels import Factors, lowrank_linear, lowrank_linear_grouped, pack_factors
from grasp_kernels.dispatch import BACKENDS


class InputGroup:
    """Low-rank linears that take the same input: the call of the first one computes all of them with one op.

    The other members return the stored outputs if they are called with the same tensor object; otherwise each member
    computes its own output. The group has no parameters and does not appear in ``state_dict``. Each thread has its own
    stored outputs. The group is not used on a CPU without gradients, where separate calls are faster.

    A layer holds its group. The group does not keep a layer alive; after a member is gone, the others compute alone.
    """

    def __init__(self, members: Sequence[LowRankLinear]) -> None:
        self._members = [weakref.ref(member) for member in members]
        self._pending: dict[int, _PendingOutputs] = {}  # by thread
        self._packed: tuple[object, list[Factors]] | None = None

    @property
    def members(self) -> list[LowRankLinear]:
        """The living members, in order."""
        members = [ref() for ref in self._members]
        return [member for member in members if member is not None]

    def output(self, member: LowRankLinear, x: Tensor) -> Tensor:
        """The output of ``member`` for ``x``: (..., in_features) → (..., out_features)."""
        if len(self._members) == 1:
            return lowrank_linear(x, *self._packed_for(x, [member.factors])[0], backend=member.backend)
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
        output, stamp = pending.outputs.pop(index)
        if pending.outputs:
            self._pending[thread] = pending
        return output if stamp == _stamp(x, factors) else lowrank_linear(x, *factors, backend=member.backend)

    def _compute_all(self, members: list[LowRankLinear], x: Tensor, thread: int) -> Tensor:
        """Compute all members, store the outputs of the others, and return that of the first."""
        factors, backend = [member.factors for member in members], members[0].backend
        if any(group.U.device != x.device for group in factors):  # a member was offloaded after it was grouped
            return lowrank_linear(x, *factors[0], backend=backend)
        outputs = lowrank_linear_grouped(x, self._packed_for(x, factors), backend=backend)
        others = zip(outputs[1:], factors[1:], strict=True)
        pending = {index: (output, _stamp(x, group)) for index, (output, group) in enumerate(others, start=1)}
        self._pending[thread] = _PendingOutputs(x, pending)
        return outputs[0]

    def _packed_for(self, x: Tensor, factors: list[Factors]) -> list[Factors]:
        """The members' factors, packed once for all calls if a GPU kernel reads them and no gradient is taken.

        PyTorch does not count writes through ``.data`` or under ``inference_mode``. Call ``group_linears_`` after one.
        """
        if not x.is_cuda or is_grad_enabled() or is_compiling():
            return factors
        tensors = [tensor for group in factors for tensor in group if tensor is not None]
        stamp = [(t.data_ptr(), tuple(t.shape), t.dtype, _version(t)) for t in tensors]
        packed = self._packed
        if packed is None or packed[0] != stamp:
            if any(map(is_fetched_per_call, self.members)):
                return factors  # a packed copy would stay on the device
            packed = self._packed = (stamp, pack_factors(factors))
        return packed[1]

    def __deepcopy__(self, memo: dict[int, Any]) -> InputGroup:
        """A group of the copied members, without stored outputs and packed factors."""
        group = InputGroup([])
        memo[id(self)] = group
        group.__init__([copy.deepcopy(member, memo) for member in self.members])  # type: ignore[misc]
        return group

    def __reduce__(self) -> tuple[type[InputGroup], tuple[list[LowRankLinear]]]:
        return InputGroup, (self.members,)


class _PendingOutputs(NamedTuple):
    """Outputs for ``x`` that were computed and not yet returned."""

    x: Tensor
    outputs: dict[int, tuple[Tensor, object]]  # index of the member → its output and the stamp of the computation


def _stamp(x: Tensor, factors: Factors) -> object:
    """Equal in two calls of members of a group if an output computed in the first is valid in the second."""
    if is_compiling():
        return None  # the inputs of a graph do not change while it runs
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return is_grad_enabled(), autocast, _version(x), [_version(t) for t in factors if t is not None]


def _version(tensor: Tensor) -> int:
    """A number that changes with every write that PyTorch counts; it does not count writes to inference tensors."""
    return -1 if tensor.is_inference() else tensor._version


def _faster_alone(x: Tensor) -> bool:
    """Whether separate calls are faster than one op for a group: on a CPU without gradients."""
    return x.is_cpu and not is_grad_enabled() and not is_compiling()


def group_linears_(model: nn.Module, enabled: bool = True) -> list[tuple[str, ...]]:
    """Group low-rank linears that share an input, so that one op computes them; results and ``state_dict`` stay.

    Args:
        model: any module; existing groups of its low-rank linears are discarded.
        enabled: ``False`` only discards the groups.

    Returns:
        The groups, as the paths of their members.

    Example:
        >>> names = ("gate_proj", "up_proj", "down_proj")
        >>> mlp = nn.ModuleDict({name: LowRankLinear(8, 8, 2) for name in names})
        >>> group_linears_(mlp)
        [('gate_proj', 'up_proj')]
    """
    groups: list[tuple[str, ...]] = []
    for path, parent in list(model.named_modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LowRankLinear)}
        for child in children.values():
            child.group = InputGroup([child])
        for names in family_of(path).shared_inputs if enabled and children else ():
            members = {name: children[name] for name in names if name in children}
            if len(members) > 1 and not any(map(is_fetched_per_call, members.values())):
                group = InputGroup(list(members.values()))
                for member in members.values():
                    member.group = group
                groups.append(tuple(f"{path}.{name}".lstrip(".") for name in members))
    return groups


def set_backend_(model: nn.Module, backend: str) -> None:
    """Run all low-rank linears of a model on one backend; a call that the backend does not support raises.

    Args:
        model: any module.
        backend: ``"auto"``, the initial value, selects the first backend that supports a call.

    Raises:
        ValueError: if there is no such backend.

    Example:
        >>> layer = LowRankLinear(8, 8, 2)
        >>> set_backend_(layer, "reference")
        >>> layer.backend
        'reference'
    """
    if backend not in (known := ["auto", *(row.name for row in BACKENDS)]):
        raise ValueError(f"unknown backend {backend!r}; expected one of {', '.join(known)}")
    for module in model.modules():
        if isinstance(module, LowRankLinear):
            module.backend = backend


def _balanced(svd: SVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and Vh with the singular values folded in: each column of U gets the norm of the same row of Vh.

    In fp16 the rows of Vh have norm 1, because ``x @ Vh.mT`` is stored in fp16 and overflows at 65504.
    """
    tiny = torch.finfo(svd.S.dtype).tiny
    columns = torch.linalg.vector_norm(svd.U, dim=0).clamp_min(tiny)
    rows = torch.linalg.vector_norm(svd.Vh, dim=1).clamp_min(tiny)
    length = svd.S * columns * rows
    right = torch.ones_like(length) if dtype == torch.float16 else length.sqrt()
    return svd.U * (length / right / columns), svd.Vh * (right / rows)[:, None]


class LowRankLinear(nn.Module):
    """A linear layer of rank R: ``y = (x @ Vh.mT) @ U.mT + bias``.

    The parameters are U (N, R), Vh (R, K) and bias (N,) or ``None``, of one dtype. The singular values are folded into
    both factors, in fp16 into U alone.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at most ``min(N, K)``.
        bias: ``False`` for a layer without bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        ValueError: if ``rank`` is impossible.

    Example:
        >>> dense = nn.Linear(16, 8)
        >>> layer = LowRankLinear.from_dense(dense, torch.arange(3))  # the three largest singular values
        >>> layer(torch.randn(2, 16)).shape
        torch.Size([2, 8])
        >>> layer
        LowRankLinear(in_features=16, out_features=8, rank=3, bias=True, parameters=56.2% of dense)
    """

    U: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None
    backend = "auto"  # see ``set_backend_``
    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism passes the local part to the op, no DTensor

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
        """Draw random factors such that ``U @ Vh`` has the variance of the weight of a new ``nn.Linear``."""
        nn.init.normal_(self.U, std=self.rank**-0.5)
        nn.init.normal_(self.Vh, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(cls, linear: DenseLinear, rank: int, *, device: torch.device | str | None = None) -> LowRankLinear:
        """A random low-rank linear with the shape, bias, dtype and mode of a dense one, on its device by default."""
        n, k = dense_shape(linear)
        device, dtype = linear.weight.device if device is None else device, linear.weight.dtype
        layer = cls(k, n, rank, bias=linear.bias is not None, device=device, dtype=dtype)
        return layer.train(linear.training)

    @classmethod
    def from_dense(cls, linear: DenseLinear, indices: Tensor, svd: SVD | None = None) -> LowRankLinear:
        """Make a low-rank linear from some singular groups of a dense linear.

        Args:
            linear: an ``nn.Linear`` or GPT-2's ``Conv1D``.
            indices: (R,) int64, the retained groups; 0 has the largest singular value.
            svd: the decomposition of the weight; ``None`` computes it.

        Raises:
            ValueError: if ``indices`` is empty, out of range or has duplicates.
            NonFiniteError: if the weight has NaN or infinite entries.
        """
        n, k = dense_shape(linear)
        groups = min(n, k)
        retained = indices.tolist()
        if not retained or min(retained) < 0 or max(retained) >= groups or len(set(retained)) < len(retained):
            raise ValueError(f"indices must be one or more distinct integers in 0..{groups - 1}; got {retained}")
        U, S, Vh = decompose(dense_weight(linear)) if svd is None else svd
        indices = indices.to(S.device)
        layer = cls.like(linear, len(retained), device=execution_device(linear))
        with torch.no_grad():
            left, right = _balanced(SVD(U[:, indices], S[indices], Vh[indices]), linear.weight.dtype)
            layer.U.copy_(left)
            layer.Vh.copy_(right)
            if layer.bias is not None:
                layer.bias.copy_(gathered(fetched(linear, "bias")))
        return layer

    @classmethod
    def from_factors(cls, linear: DenseLinear, tensors: Mapping[str, Tensor]) -> LowRankLinear:
        """The low-rank linear with the parameters ``tensors`` that ``from_dense`` made from a dense one before."""
        layer = cls.like(linear, len(tensors["Vh"]), device=execution_device(linear))
        layer.load_state_dict(dict(tensors))
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        tensors = self._parameters  # reading the attributes takes a microsecond more
        if len(tensors) == 3 and _faster_alone(x):  # a parametrization leaves fewer
            return lowrank_linear(x, tensors["U"], None, tensors["Vh"], tensors["bias"], backend=self.backend)  # type: ignore[arg-type]
        return self.group.output(self, x)

    @property
    def factors(self) -> Factors:
        """The arguments of the ops."""
        return Factors(self.U, None, self.Vh, self.bias)

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The product ``U @ Vh``, (out_features, in_features) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        return self.U.to(dtype) @ self.Vh.to(dtype)

    def extra_repr(self) -> str:
        """Shape, rank, and the parameters as a percentage of the dense weight's."""
        dense = self.in_features * self.out_features
        share = self.rank * (self.in_features + self.out_features) / dense
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, parameters={share:.1%} of dense"
        )
