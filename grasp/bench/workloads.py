"""The ops that benchmarks time: operands, backends, plain PyTorch forms, and the check of a result."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from grasp.method.pivoting import in_order
from grasp.method.rounding import round_nearest
from grasp.method.storage import Storage, matrix_bytes
from grasp.model.lowrank_linear import pivots_order
from grasp_kernels import Factors, lowrank_glu, lowrank_linear, lowrank_linear_grouped, roofline, singular_value_grad
from grasp_kernels.dispatch import BACKENDS, OpCall, objection
from grasp_kernels.numerics import inaccuracy
from grasp_kernels.quantized import pack_int4
from grasp_kernels.reference import linear
from grasp_kernels.roofline import Cost
from grasp_kernels.shapes import GroupShape
from speedgate.timing import Rotation

# The shapes of all benchmarks of the ops, with a tenth of the parameters, the paper's ratio.
# Llama-2-7B: q, k, v and o; gate or up; down. Llama-3.1-8B: k or v; gate or up. SmolLM2-135M: gate or up.
ATTENTION, MLP, DOWN = "4096x4096r204", "4096x11008r298", "11008x4096r298"
GROUPED_QUERY, WIDE_MLP, SMALL_MLP = "4096x1024r81", "4096x14336r318", "576x1536r41"
QKV, GATE_UP = "+".join([ATTENTION] * 3), "+".join([MLP] * 2)
GROUPED_QUERY_QKV = "+".join([ATTENTION, GROUPED_QUERY, GROUPED_QUERY])


class Problem(NamedTuple):
    """Operands of one call."""

    x: Tensor  # (M, K)
    groups: list[Factors]
    weights: list[Tensor]  # (N, K) of the dense baseline, one per linear
    grad_y: Tensor  # (M, N) for the singular-value gradient, else empty

    def tensors(self) -> list[Tensor]:
        """All operands."""
        return [
            self.x,
            *(tensor for group in self.groups for tensor in _stored(group).values()),
            *self.weights,
            self.grad_y,
        ]

    def map(self, function: Callable[[Tensor], Tensor]) -> Problem:
        """Apply ``function`` to every tensor."""
        groups = [
            group._replace(**{name: function(tensor) for name, tensor in _stored(group).items()})
            for group in self.groups
        ]
        return Problem(function(self.x), groups, [function(w) for w in self.weights], function(self.grad_y))


def _stored(group: Factors) -> dict[str, Tensor]:
    """The tensors that a call reads once, by field."""
    fields = {name: getattr(group, name) for name in ("U", "Vh", "U_scales", "Vh_scales")}
    return {name: tensor for name, tensor in fields.items() if tensor is not None}


Run = Callable[[Problem], list[Tensor]]


@dataclass(frozen=True)
class Op:
    """One op, the plain PyTorch forms that it is compared with, and its cost."""

    kind: str  # key of the tolerance
    linears: range  # numbers of linears that the op takes
    run: Callable[[str, Problem], list[Tensor]]  # of a backend's name and operands
    unfused: Run
    dense: Run
    cost: Callable[[int, GroupShape, int], Sequence[Cost]]  # of rows, shape and bytes per element
    repeat: int = 1  # times that a single linear is repeated to make a group
    one_width: bool = False  # all linears must have the same N

    def fit(self, shape: GroupShape) -> GroupShape | None:
        """``shape``, with a single linear repeated ``repeat`` times; ``None`` if the op does not take it."""
        if len(shape) == 1:
            return shape * self.repeat
        if self.one_width and len({linear.N for linear in shape}) > 1:
            return None
        return shape if len(shape) in self.linears else None


def _twice(problem: Problem, group: int = 0) -> Tensor:
    U, _, Vh, _, order, *_ = problem.groups[group]
    return linear(F.linear(problem.x, Vh), U, None, order=order)


def _unfused_grad(problem: Problem) -> list[Tensor]:
    """Two matmuls, a product and a sum; both (M, R) operands are written to memory."""
    U, _, Vh, *_ = problem.groups[0]
    products = (problem.grad_y @ U).to(_wide(problem.x)) * (problem.x @ Vh.mT)
    return [products.sum(0)]


def _dense_grad(problem: Problem) -> list[Tensor]:
    """The diagonal of ``U.mT @ G @ Vh.mT``, computed from the weight's gradient G."""
    U, _, Vh, *_ = problem.groups[0]
    gradient = problem.grad_y.mT @ problem.x
    return [((U.mT @ gradient).to(_wide(problem.x)) * Vh).sum(1)]


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


OPS: dict[str, Op] = {
    "lowrank_linear": Op(
        "linear",
        range(1, 2),
        run=lambda backend, p: [lowrank_linear(p.x, *p.groups[0], backend=backend)],
        unfused=lambda p: [_twice(p)],
        dense=lambda p: [F.linear(p.x, p.weights[0])],
        cost=lambda M, shape, size: roofline.lowrank_linear(M, shape[0].N, shape[0].K, shape[0].R, itemsize=size),
    ),
    "lowrank_linear_grouped": Op(
        "linear",
        range(2, sys.maxsize),
        run=lambda backend, p: list(lowrank_linear_grouped(p.x, p.groups, backend=backend)),
        unfused=lambda p: [_twice(p, group) for group in range(len(p.groups))],
        dense=lambda p: [F.linear(p.x, weight) for weight in p.weights],
        cost=lambda M, shape, size: roofline.lowrank_linear_grouped(
            M, shape[0].K, [(linear.N, linear.R) for linear in shape], itemsize=size
        ),
        repeat=3,  # q, k and v
    ),
    "lowrank_glu": Op(
        "linear",
        range(2, 3),
        run=lambda backend, p: [lowrank_glu(p.x, p.groups[0], p.groups[1], backend=backend)],
        unfused=lambda p: [F.silu(_twice(p, 0)) * _twice(p, 1)],
        dense=lambda p: [F.silu(F.linear(p.x, p.weights[0])) * F.linear(p.x, p.weights[1])],
        cost=lambda M, shape, size: roofline.lowrank_glu(
            M, shape[0].N, shape[0].K, shape[0].R, shape[1].R, itemsize=size
        ),
        repeat=2,
        one_width=True,
    ),
    "singular_value_grad": Op(
        "singular_value_grad",
        range(1, 2),
        run=lambda backend, p: [
            singular_value_grad(p.x, p.grad_y, p.groups[0].U, p.groups[0].Vh, backend=backend).first
        ],
        unfused=_unfused_grad,
        dense=_dense_grad,
        cost=lambda M, shape, size: roofline.singular_value_grad(M, shape[0].N, shape[0].K, shape[0].R, itemsize=size),
    ),
}


def make_problem(
    op: str,
    shape: GroupShape,
    rows: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    pivoted: bool | Sequence[bool] = False,
) -> Problem:
    """Gaussian operands that give outputs of about unit variance; not zeros, which processors multiply faster.

    ``pivoted`` is of all linears, or of each.
    """
    forms = [pivoted] * len(shape) if isinstance(pivoted, bool) else pivoted
    generator = torch.Generator(device).manual_seed(0)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)

    K = shape[0].K
    groups = [
        Factors(
            normal(N - R * pivots, R, scale=R**-0.5),
            None,
            normal(R, K, scale=K**-0.5),
            order=pivots_order(torch.arange(R) * N // R, N).to(device) if pivots else None,
        )
        for (_, N, R), pivots in zip(shape, forms, strict=True)
    ]
    if op == "singular_value_grad":
        return Problem(normal(rows, K), groups, [], normal(rows, shape[0].N))
    weights = [_weight(group).to(dtype) for group in groups]
    return Problem(normal(rows, K), groups, weights, normal(0))


def quantized(problem: Problem, storages: Sequence[Storage | None]) -> Problem:
    """The same operands with factors rounded to the nearest where there is a storage; scales in the dtype of x."""

    def rounded(matrix: Tensor, storage: Storage) -> tuple[Tensor, Tensor]:
        values, scales = round_nearest(matrix, storage)
        return pack_int4(values) if storage.bits == 4 else values, scales.to(matrix.dtype)

    groups = []
    for group, storage in zip(problem.groups, storages, strict=True):
        if storage is not None:
            (U, U_scales), (Vh, Vh_scales) = rounded(group.U, storage), rounded(group.Vh, storage)
            group = group._replace(U=U, Vh=Vh, U_scales=U_scales, Vh_scales=Vh_scales)
        groups.append(group)
    return problem._replace(groups=groups)


def low_rank_costs(
    op: str,
    shape: GroupShape,
    rows: int,
    itemsize: int,
    pivoted: Sequence[bool] = (),
    storages: Sequence[Storage | None] = (),
) -> list[Cost]:
    """Bytes and FLOPs of a call; ``pivoted`` and ``storages`` are of each linear, empty for none."""
    pivots, storages = pivoted or (False,) * len(shape), storages or (None,) * len(shape)
    saved, ranks = 0, []
    for (K, N, R), is_pivoted, storage in zip(shape, pivots, storages, strict=True):
        ranks += [R] * is_pivoted
        factors = ((N - R * is_pivoted, R), (R, K))
        saved += matrix_bytes(factors, None, itemsize) - matrix_bytes(factors, storage, itemsize)
    costs = [roofline.pivoted(cost, rows, ranks, itemsize=itemsize) for cost in OPS[op].cost(rows, shape, itemsize)]
    return [cost._replace(bytes=cost.bytes - saved) for cost in costs]


def _weight(group: Factors) -> Tensor:
    """The dense weight in fp32."""
    product = group.U.float() @ group.Vh.float()
    return product if group.order is None else in_order(torch.cat([group.Vh.float(), product]), group.order)


def rotation(op: str, problem: Problem, rotate_bytes: int, *, dense: bool = False) -> Rotation[Problem]:
    """Copies of the operands of low-rank or of ``dense`` providers, ``rotate_bytes`` in all, at least one copy.

    All copies share the input of a linear: in a model the layer before has just written it.
    """
    if op == "singular_value_grad":
        return Rotation(_copies(problem, rotate_bytes))
    copied, nothing = "weights" if dense else "groups", problem.x.new_empty(0)
    operands = Problem(nothing, [], [], nothing)._replace(**{copied: getattr(problem, copied)})
    copies = _copies(operands, rotate_bytes)
    return Rotation([problem._replace(**{copied: getattr(copy, copied)}) for copy in copies])


def _copies(problem: Problem, rotate_bytes: int) -> list[Problem]:
    size = sum(tensor.nbytes for tensor in problem.tensors())
    return [problem, *(problem.map(Tensor.clone) for _ in range(1, rotate_bytes // size))]


def backends(
    op: str, shape: GroupShape, problem: Problem, *, pivoted: bool = False, weights: frozenset[str] = frozenset()
) -> tuple[dict[str, Run], dict[str, str]]:
    """The backends that run this call; the others with their reasons."""
    runs: dict[str, Run] = {}
    reasons: dict[str, str] = {}
    rank = max(linear.R for linear in shape)
    call = OpCall(op, problem.x.device, problem.x.dtype, problem.x.shape[0], rank, pivoted, weights)
    for row in BACKENDS:
        reason = objection(row, call)
        if reason is None:
            runs[row.name] = partial(OPS[op].run, row.name)
        else:
            reasons[row.name] = reason
    return runs, reasons


def compiled(op: str, problem: Problem) -> Run:
    """The unfused form compiled by ``torch.compile``, with flat arguments, so that a call checks few guards.

    Raises:
        RuntimeError: if it cannot be compiled here, for example because there is no C++ compiler.
    """
    unfused = OPS[op].unfused

    def flat(x: Tensor, grad_y: Tensor, *factors: Tensor | None) -> list[Tensor]:
        groups = [
            Factors(U, None, Vh, order=order)  # type: ignore[arg-type]
            for U, Vh, order in zip(factors[::3], factors[1::3], factors[2::3], strict=True)
        ]
        return unfused(Problem(x, groups, [], grad_y))

    torch.compiler.reset()  # earlier shapes would count towards the limit of recompilations
    mode = "max-autotune-no-cudagraphs" if problem.x.is_cuda else None
    function = torch.compile(flat, fullgraph=True, dynamic=False, mode=mode)

    def run(problem: Problem) -> list[Tensor]:
        factors = chain.from_iterable((group.U, group.Vh, group.order) for group in problem.groups)
        return function(problem.x, problem.grad_y, *factors)

    run(problem)
    return run


def _floating(problem: Problem, dtype: torch.dtype) -> Problem:
    """The same operands with quantised factors in ``dtype``."""
    K = problem.x.shape[-1]
    return problem._replace(groups=[g.dequantized(K, dtype) if g.quantized else g for g in problem.groups])


@torch.inference_mode()
def wrong(op: str, problem: Problem, run: Run, *, of_package: bool = True) -> str | None:
    """The error of a provider's result at this shape by the tolerance rule of the tests, or ``None``.

    Args:
        op: key of ``OPS``.
        problem: the operands.
        run: the provider.
        of_package: whether the provider belongs to the package. Its gradients must be as accurate as PyTorch's in
            fp32; those of other providers as accurate as PyTorch's in the dtype of the operands.
    """
    unfused, kind, dtype = OPS[op].unfused, OPS[op].kind, problem.x.dtype
    slim = problem._replace(weights=[])
    exact = unfused(_floating(slim, torch.float64).map(Tensor.double))
    slim = _floating(slim, dtype)
    wide = of_package and kind == "singular_value_grad"
    plain = unfused(slim.map(lambda tensor: tensor.to(_wide(tensor))) if wide else slim)
    parts = zip(run(problem), plain, exact, strict=True)
    return next((complaint for part in parts if (complaint := inaccuracy(kind, dtype, *part))), None)
