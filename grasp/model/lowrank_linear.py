"""The low-rank linear layer, and groups of such layers that one op computes and one memory holds."""

from __future__ import annotations

import copy
import functools
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from grasp.method.pivoting import LARGEST_GROWTH, NotPivoted, factored, in_order, other_rows, pivot
from grasp.method.svd import SVD, decompose
from grasp.model.dense import DenseLinear, dense_shape, dense_weight, gathered
from grasp.model.families import family_of
from grasp.model.gated_mlp import ACTIVATIONS, is_gated_forward
from grasp.model.offload import execution_device, fetched, is_fetched_per_call
from grasp_kernels import Factors, lowrank_glu, lowrank_linear, lowrank_linear_grouped
from grasp_kernels.dispatch import BACKENDS, CUDA_ROWS, backend_missing
from grasp_kernels.packing import close_columns, has_padding, may_pad, packed_memory, pad_columns, stack_rows, stacked


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
        output, stamp = pending.outputs.pop(index)
        if pending.outputs:
            self._pending[thread] = pending
        return output if stamp == _stamp(x, factors) else lowrank_linear(x, *factors, backend=member.backend)

    def _compute_all(self, members: list[LowRankLinear], x: Tensor, thread: int) -> Tensor:
        """Compute all members, store the outputs of the others, and return that of the first."""
        factors, backend = [member.factors for member in members], members[0].backend
        if any(group.U.device != x.device for group in factors):  # a member was offloaded after it was grouped
            return lowrank_linear(x, *factors[0], backend=backend)
        outputs = lowrank_linear_grouped(x, factors, backend=backend)
        others = zip(outputs[1:], factors[1:], strict=True)
        pending = {index: (output, _stamp(x, group)) for index, (output, group) in enumerate(others, start=1)}
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
                _place_columns(member)

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


def _place_columns(layer: LowRankLinear) -> None:
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
    """Whether ``pack_`` moves the factors of a layer; no kernel reads pivoted ones in packed memory."""
    return _is_movable(layer) and layer.order is None and _gains_by_packing(layer.U) and _gains_by_packing(layer.Vh)


def _gains_by_packing(factor: Tensor) -> bool:
    """Whether the kernels for the factor's device read packed memory faster: on a GPU."""
    return factor.is_cuda


def _is_stacked(Vhs: Sequence[Tensor]) -> bool:
    """Whether the Vh of a group, each with its padding, lie one behind the other."""
    memories = [memory for Vh in Vhs if (memory := packed_memory(Vh, 0)) is not None]
    return len(memories) == len(Vhs) and stacked(memories) is not None


def _faster_alone(x: Tensor) -> bool:
    """Whether separate calls are faster than one op for a group: on a CPU without gradients."""
    return x.is_cpu and not is_grad_enabled() and not is_compiling()


@functools.cache
def _gated(kind: Any) -> Any:
    """A subclass of a gated MLP's class with its name: ``lowrank_glu`` computes gate, activation and up if it can.

    A class, not a forward of the instance: replicas and copies use their own factors, and no cycle keeps an MLP alive.
    """

    class Gated(kind):
        gated_kind = kind

        def forward(self, x: Tensor) -> Tensor:
            if _gains_by_fusing(x) and (product := _gated_product(self, x)) is not None:
                return self.down_proj(product)
            return super().forward(x)

        def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
            return _new_gated, (kind,), *object.__reduce_ex__(self, 2)[2:]  # for pickle and deepcopy

    Gated.__name__, Gated.__qualname__, Gated.__module__ = kind.__name__, kind.__qualname__, kind.__module__
    return Gated


def _new_gated(kind: Any) -> Any:
    return _gated(kind).__new__(_gated(kind))


def _gated_product(mlp: Any, x: Tensor) -> Tensor | None:
    """``act_fn(gate_proj(x)) * up_proj(x)`` by one op; ``None`` if it cannot, or if more than the formula must run."""
    gate, up, activation = mlp.gate_proj, mlp.up_proj, ACTIVATIONS.get(type(mlp.act_fn))
    if (
        activation is None
        or not type(gate) is type(up) is LowRankLinear
        or not gate.backend == up.backend == "auto"
        or not gate.U.device == up.U.device == x.device  # one was offloaded
        or not all(map(_is_bare, (gate, up, mlp.act_fn)))
    ):
        return None
    return lowrank_glu(x, gate.factors, up.factors, activation=activation)


def _is_bare(module: nn.Module) -> bool:
    """Whether a call of the module is its forward and nothing else: no hooks, and no library has replaced it."""
    hooks = (module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks)
    return not any(hooks) and "forward" not in vars(module)


def _gains_by_fusing(x: Tensor) -> bool:
    """Whether ``lowrank_glu`` is faster than linears, activation and product: on a GPU, where it writes a third.

    Not where ``cuda`` runs the linears of an eager call, whose time is that of the host. Not with gradients: the op
    would compute gate and up again in the backward pass. On a CPU, measured, it is up to a third slower at one row.
    """
    if not x.is_cuda or is_grad_enabled():
        return False
    return is_compiling() or x.numel() > CUDA_ROWS * x.shape[-1] or backend_missing("cuda") is not None


def _fuse_gate_(module: nn.Module, enabled: bool) -> None:
    """Give a gated MLP the class that uses ``lowrank_glu``, or return it to its own; no-op for other modules."""
    kind: Any = vars(type(module)).get("gated_kind", type(module))
    low_rank = type(getattr(module, "gate_proj", None)) is type(getattr(module, "up_proj", None)) is LowRankLinear
    wanted = _gated(kind) if enabled and low_rank and is_gated_forward(kind.forward) else kind
    if type(module) is not wanted:
        module.__class__ = wanted


def group_linears_(model: nn.Module, enabled: bool = True) -> list[tuple[str, ...]]:
    """Group low-rank linears that share an input, so that one op computes them; results and ``state_dict`` stay.

    Factors on a GPU, also ones that arrive there later, move to packed memory: the Vh of a group one behind the other,
    ranks padded with zeros to a multiple of 16. The parameters keep their shapes. A U of another rank has rows that are
    not adjacent. Fused optimizers, FSDP2 and ``safetensors.torch`` refuse such parameters. So ``train()`` makes a U
    that requires gradients contiguous, and ``eval()`` returns it to the same memory. A copy of a model is packed by the
    next call of this function, or of ``to()`` with another device or dtype.

    On a GPU without gradients, ``lowrank_glu`` computes gate, activation and up of an MLP in one op, if both linears
    are low-rank, nothing hooks into them, and the source of the MLP's forward is the formula of ``gated_mlp.py``.

    Args:
        model: any module; existing groups of its low-rank linears are discarded.
        enabled: ``False`` only discards the groups and fused MLPs, and makes all factors contiguous.

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
        _fuse_gate_(parent, enabled)
        children = {name: child for name, child in parent.named_children() if isinstance(child, LowRankLinear)}
        for child in children.values():
            if not enabled:
                child.group.unpack_()
            child.group = InputGroup([child], packs=enabled)
        for names in family_of(path).shared_inputs if enabled and children else ():
            members = {name: children[name] for name in names if name in children}
            if len(members) > 1 and not any(map(is_fetched_per_call, members.values())):
                group = InputGroup(list(members.values()), packs=True)
                for member in members.values():
                    member.group = group
                groups.append(tuple(f"{path}.{name}".lstrip(".") for name in members))
        for child in children.values():
            child.group.pack_()
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


def is_order(table: Tensor, rank: int) -> bool:
    """Whether a table is the ``order`` of pivoted factors of a rank, ``pivots_order(pivots, N)`` for some pivots.

    Args:
        table: (N,), integers.
        rank: R.
    """
    size = len(table)
    parts = table.split([rank, size - rank])
    ascending = all(bool((part.diff() > 0).all()) for part in parts)
    return ascending and torch.equal(table.sort().values, torch.arange(size, dtype=table.dtype, device=table.device))


def pivots_order(pivots: Tensor, size: int) -> Tensor:
    """The pivots, then the other rows, each ascending: (N,) int32.

    Args:
        pivots: (R,) int64, ascending.
        size: N.
    """
    return torch.cat([pivots, other_rows(pivots, size)]).to(torch.int32)


class LowRankLinear(nn.Module):
    """A linear layer of rank R: ``y = (x @ Vh.mT) @ U.mT + bias``.

    The parameters are U (N, R), Vh (R, K) and bias (N,) or ``None``, of one dtype. The singular values are folded into
    both factors, in fp16 into U alone.

    A pivoted layer has R² fewer parameters: Vh has R rows of the weight, and U (N − R, R) gives the others,
    ``h = x @ Vh.mT; y[..., order] = cat([h, h @ U.mT])``. The buffer ``order``, (N,) int32, has the rows in Vh, then
    the others, each ascending; it is ``None`` in a layer that is not pivoted. See ``pivot_`` and ``factor_``.

    Args:
        in_features: K.
        out_features: N.
        rank: R, at most ``min(N, K)``.
        bias: ``False`` for a layer without bias.
        pivoted: R is below N then. The rows in Vh are the first ones at first.
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
    order: Tensor | None
    backend = "auto"  # see ``set_backend_``
    _hf_quantized_needs_local_tp = True  # transformers' tensor parallelism passes the local part to the op, no DTensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        bias: bool = True,
        *,
        pivoted: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        highest = min(in_features, out_features - pivoted)
        if not 1 <= rank <= highest:
            raise ValueError(
                f"rank must be between 1 and {highest} for a {'pivoted ' * pivoted}linear of "
                f"{in_features} inputs and {out_features} outputs, got {rank}"
            )
        self.in_features, self.out_features, self.rank = in_features, out_features, rank
        self.U = nn.Parameter(torch.empty(out_features - rank * pivoted, rank, device=device, dtype=dtype))
        self.Vh = nn.Parameter(torch.empty(rank, in_features, device=device, dtype=dtype))
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        order = torch.arange(out_features, dtype=torch.int32, device=device) if pivoted else None
        self.register_buffer("order", order)
        self.group = InputGroup([self])
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw random factors such that the weight has the variance of that of a new ``nn.Linear``."""
        nn.init.normal_(self.U, std=self.rank**-0.5)
        nn.init.normal_(self.Vh, std=(3 * self.in_features) ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @classmethod
    def like(
        cls, linear: DenseLinear, rank: int, *, pivoted: bool = False, device: torch.device | str | None = None
    ) -> LowRankLinear:
        """A random low-rank linear with the shape, bias, dtype and mode of a dense one, on its device by default."""
        n, k = dense_shape(linear)
        device, dtype = linear.weight.device if device is None else device, linear.weight.dtype
        layer = cls(k, n, rank, bias=linear.bias is not None, pivoted=pivoted, device=device, dtype=dtype)
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
        """The low-rank linear, in place of a dense one, whose ``state_dict`` is ``tensors``."""
        layer = cls.like(linear, len(tensors["Vh"]), pivoted="order" in tensors, device=execution_device(linear))
        layer.load_state_dict(dict(tensors))
        return layer

    def train(self, mode: bool = True) -> LowRankLinear:
        """Set the mode, and move U as ``group_linears_`` says."""
        super().train(mode)
        _place_columns(self)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LowRankLinear:
        moved = False

        def watched(tensor: Tensor) -> Tensor:
            nonlocal moved
            result = fn(tensor)
            moved = moved or result is not tensor
            return result

        super()._apply(watched, recurse)
        if moved:
            self.group.pack_()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        table, before = state_dict.get(f"{prefix}order"), dict(self._parameters)
        if not self._accepts_order(table):
            errors: list[str] = args[-1]
            errors.append(f"{prefix}order is not the order of pivoted factors of rank {self.rank}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(self._parameters.get(name) is not parameter for name, parameter in before.items()):  # assign=True
            self.group.pack_()

    def _accepts_order(self, table: Any) -> bool:
        """Whether the values of a table may be loaded; PyTorch refuses another type and shape."""
        if self.order is None or not isinstance(table, Tensor) or table.shape != self.order.shape or table.is_meta:
            return True
        return not table.is_floating_point() and is_order(table, self.rank)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        tensors = self._parameters  # reading the attributes takes a microsecond more
        if len(tensors) == 3 and _faster_alone(x):  # a parametrization leaves fewer
            order = self._buffers["order"]
            return lowrank_linear(x, tensors["U"], None, tensors["Vh"], tensors["bias"], order, backend=self.backend)  # type: ignore[arg-type]
        return self.group.output(self, x)

    @property
    def factors(self) -> Factors:
        """The arguments of the ops."""
        return Factors(self.U, None, self.Vh, self.bias, self.order)

    def set_factors_(self, U: Tensor, Vh: Tensor, order: Tensor | None = None) -> None:
        """Replace the factors, in the dtype and on the device of the old ones; the rank may change.

        Args:
            U: (N, R), or (N − R, R) with ``order``.
            Vh: (R, K).
            order: of pivoted factors, (N,) int32, not checked.
        """
        self.U = nn.Parameter(U.to(self.U), requires_grad=self.U.requires_grad)
        self.Vh = nn.Parameter(Vh.to(self.Vh), requires_grad=self.Vh.requires_grad)
        self.rank, self.order = len(Vh), None if order is None else order.to(self.U.device)
        self.group.pack_()

    @torch.no_grad()
    def pivot_(self) -> str | None:
        """Write the factors in pivoted form, which has R² fewer parameters. Exact but for rounding.

        Returns:
            The reason why the layer is not pivoted; ``None`` if it is now, or was before.

        Raises:
            NonFiniteError: if a factor has NaN or infinite entries.

        Example:
            >>> layer = LowRankLinear(8, 8, 4, bias=False)
            >>> layer.pivot_()
            >>> sum(parameter.numel() for parameter in layer.parameters())
            48
        """
        if self.order is not None:
            return None
        if self.rank == self.out_features:
            return f"its rank is the number of its outputs, {self.rank}"
        form = pivot(self.U.detach(), self.Vh.detach())
        if isinstance(form, NotPivoted):
            return f"rounding errors would grow {form.growth:.3g}-fold; the limit is {LARGEST_GROWTH:g}"
        self.set_factors_(form.C, form.Vp, pivots_order(form.pivots, self.out_features))
        return None

    @torch.no_grad()
    def factor_(self) -> None:
        """Write pivoted factors as U (N, R) and Vh, with the identity in U. Exact; no-op for other layers."""
        if self.order is not None:
            self.set_factors_(factored(self.U.detach(), self.order), self.Vh.detach())

    @torch.no_grad()
    def dense_weight(self) -> Tensor:
        """The weight, (out_features, in_features) in fp32 (fp64 for fp64)."""
        dtype = torch.promote_types(self.U.dtype, torch.float32)
        Vh = self.Vh.to(dtype)
        product = self.U.to(dtype) @ Vh
        return product if self.order is None else in_order(torch.cat([Vh, product]), self.order)

    def extra_repr(self) -> str:
        """Shape, rank, and the parameters as a percentage of the dense weight's."""
        dense = self.in_features * self.out_features
        share = (self.U.numel() + self.Vh.numel()) / dense
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}, "
            f"bias={self.bias is not None}, {'pivoted, ' * (self.order is not None)}parameters={share:.1%} of dense"
        )
