"""The low-rank linear layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, is_grad_enabled, nn
from torch.compiler import is_compiling

from grasp.method.pivoting import LARGEST_GROWTH, factored, in_order, other_rows, pivot
from grasp.method.ranks import Form
from grasp.method.svd import SVD, decompose
from grasp.model.dense import DenseLinear, dense_shape, dense_weight, gathered
from grasp.model.input_group import InputGroup, place_columns
from grasp.model.offload import execution_device, fetched
from grasp_kernels import Factors, lowrank_linear
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.flops import register_flop_formulas
from grasp_kernels.layers import VERSION

register_flop_formulas()  # FlopCounterMode then counts the low-rank linears of a model


def order_objection(order: Tensor, rank: int, size: int) -> str | None:
    """Why a tensor is not the ``order`` of pivoted factors; ``None`` if it is ``pivots_order(pivots, N)`` for pivots.

    Args:
        order: (N,) int32; on the meta device its values are not known, and not objected to.
        rank: R.
        size: N.
    """
    if order.shape == (size,) and order.dtype == torch.int32:
        rows = torch.arange(size, dtype=torch.int32, device=order.device)
        parts = order.split([rank, size - rank])
        if order.is_meta or (torch.equal(order.sort().values, rows) and all((p.diff() > 0).all() for p in parts)):
            return None
    return (
        f"order is not the order of pivoted factors: {rank} distinct rows of 0..{size - 1} in int32, ascending, then "
        "the others"
    )


def pivots_order(pivots: Tensor, size: int) -> Tensor:
    """The pivots, then the other rows, each ascending: (N,) int32.

    Args:
        pivots: (R,) int64, ascending.
        size: N.
    """
    return torch.cat([pivots, other_rows(pivots, size)]).to(torch.int32)


class Pivotable(nn.Module):
    """A low-rank linear, floating or quantised, which may be pivoted: it loads no ``order`` that is none."""

    in_features: int
    out_features: int
    rank: int
    U: nn.Parameter
    Vh: nn.Parameter
    bias: nn.Parameter | None
    order: Tensor | None
    backend = "auto"  # see ``set_backend_``

    @property
    def form(self) -> Form:
        """``"factored"`` or ``"pivoted"``."""
        return "factored" if self.order is None else "pivoted"

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        order: Any = state_dict.get(f"{prefix}order")
        is_read = self.order is not None and isinstance(order, Tensor)
        if is_read and (objection := order_objection(order, self.rank, self.out_features)):
            errors: list[str] = args[-1]
            errors.append(f"{prefix}{objection}")
            return
        super()._load_from_state_dict(state_dict, prefix, *args)


class LowRankLinear(Pivotable):
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

    kernel_version = VERSION  # of the attributes that a forward of the library `kernels` reads
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
        """A random low-rank linear with the shape, bias, dtype and mode of a dense one, on its device by default.

        It can be trained as far as the dense one can.
        """
        n, k = dense_shape(linear)
        device, dtype = linear.weight.device if device is None else device, linear.weight.dtype
        layer = cls(k, n, rank, bias=linear.bias is not None, pivoted=pivoted, device=device, dtype=dtype)
        layer.requires_grad_(linear.weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @classmethod
    def _unset(cls, linear: DenseLinear, rank: int, *, pivoted: bool = False) -> LowRankLinear:
        """``like``, on the device where the linear runs, with factors that are still to be set: nothing is drawn."""
        return cls.like(linear, rank, pivoted=pivoted, device="meta").to_empty(device=execution_device(linear))

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
        layer = cls._unset(linear, len(retained))
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
        layer = cls._unset(linear, len(tensors["Vh"]), pivoted="order" in tensors)
        layer.load_state_dict(dict(tensors))
        return layer

    def train(self, mode: bool = True) -> LowRankLinear:
        """Set the mode, and move U as ``group_linears_`` says."""
        super().train(mode)
        place_columns(self)
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
        before = dict(self._parameters)
        super()._load_from_state_dict(state_dict, prefix, *args)
        if any(self._parameters.get(name) is not parameter for name, parameter in before.items()):  # assign=True
            self.group.pack_()

    def forward(self, x: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        tensors = self._parameters  # reading the attributes takes a microsecond more
        all_stored = "U" in tensors and "Vh" in tensors and "bias" in tensors  # else one is computed, as in pruning
        if all_stored and _faster_alone(x):
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
            order: of pivoted factors, (N,) int32: the rows in Vh, then the others, each ascending.

        Raises:
            ValueError: if ``order`` is not such an order.
        """
        if order is not None and (objection := order_objection(order, len(Vh), self.out_features)):
            raise ValueError(f"{objection}; see LowRankLinear.pivot_")
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
        if not form.growth <= LARGEST_GROWTH:  # NaN as well
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
        if isinstance(module, Pivotable):
            module.backend = backend


def _faster_alone(x: Tensor) -> bool:
    """Whether separate calls are faster than one op for a group: on a CPU without gradients."""
    return x.is_cpu and not is_grad_enabled() and not is_compiling()


def _balanced(svd: SVD, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """U and Vh with the singular values folded in: each column of U gets the norm of the same row of Vh.

    In fp16 the rows of Vh have norm 1, because ``x @ Vh.mT`` is stored in fp16 and overflows at 65504.
    """
    tiny = torch.finfo(svd.S.dtype).tiny
    columns = torch.linalg.vector_norm(svd.U, dim=0).clamp_min(tiny)
    rows = torch.linalg.vector_norm(svd.Vh, dim=1).clamp_min(tiny)
    length = svd.S * columns * rows
    right = torch.ones_like(length) if dtype == torch.float16 else length.sqrt()
    return svd.U * (length / right.clamp_min(tiny) / columns), svd.Vh * (right / rows)[:, None]
