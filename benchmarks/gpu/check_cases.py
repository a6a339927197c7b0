"""The cases of ``benchmarks.gpu.check``: ops and a whole layer, their operands, and all providers that can run them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grasp.bench.workloads import OPS, Problem, Run, backends, low_rank_costs, make_problem, quantized, wrong
from grasp.loading import DTYPES
from grasp.method.storage import parse_storages
from grasp_kernels import Factors, pack_factors, roofline
from grasp_kernels.launch_configs import PATHS, choose, on_path, serves
from grasp_kernels.packing import pad_columns, stack_rows, stacked, widened
from grasp_kernels.roofline import Cost
from grasp_kernels.shapes import GroupShape, parse_shape
from grasp_kernels.triton import lowrank_glu, lowrank_linear
from grasp_kernels.triton.launch import gpu_of
from speedgate.timing import Rotation


@dataclass(frozen=True)
class GpuCase:
    """Calls made one after the other, each an op on its own input, at one number of rows; of JSON values."""

    name: str
    calls: Sequence[tuple[str, str]]  # op and shape of each, as ``parse_shape`` reads it
    rows: int
    dtype_name: str = "bfloat16"
    packed: bool = True  # factors as a model packs them for a GPU; else with the ranks as they are
    pivoted: bool = False  # all linears; only with packed factors and the kind "graph"
    storage: str = ""  # of quantised factors, such as "int4/64"; only with unpacked factors and the kind "graph"

    @property
    def label(self) -> str:
        """Shapes of all calls, as text."""
        return " ".join(text for _, text in self.calls)

    @property
    def parts(self) -> list[tuple[str, GroupShape]]:
        """Op and shape of each call."""
        return [(op, parse_shape(text)) for op, text in self.calls]

    @property
    def dtype(self) -> torch.dtype:
        """Of inputs and factors."""
        return DTYPES[self.dtype_name]

    @property
    def weights(self) -> frozenset[str]:
        """The quantised form of the factors, as the dispatch table calls it."""
        return frozenset({self.storage.partition("/")[0]} - {""})

    def costs(self) -> list[Cost]:
        """Bytes and FLOPs of the fused ops."""
        size = self.dtype.itemsize
        return [
            cost
            for op, shape in self.parts
            for cost in low_rank_costs(
                *(op, shape, self.rows, size, (self.pivoted,) * len(shape)),
                storages=parse_storages(self.storage or None, len(shape)),
            )
        ]

    def dense_costs(self) -> list[Cost]:
        """Bytes and FLOPs of the dense linears."""
        size, linears = self.dtype.itemsize, [linear for _, shape in self.parts for linear in shape]
        return [cost for K, N, _ in linears for cost in roofline.dense_linear(self.rows, N, K, itemsize=size)]


class CaseProvider(NamedTuple):
    """One implementation of a case's calls."""

    run: Callable[[str], Run]  # of an op's name
    reads: str = "low-rank"  # operands: "low-rank" or "dense"
    of_package: bool = True  # belongs to the package, so its results must be within the tests' tolerance

    def calls(self, case: GpuCase) -> Callable[[Sequence[Problem]], list[Tensor]]:
        """All calls of the case, on one problem each."""
        runs = [self.run(op) for op, _ in case.calls]
        return lambda problems: [y for run, problem in zip(runs, problems, strict=True) for y in run(problem)]


Providers = tuple[dict[str, CaseProvider], dict[str, str]]  # by name; and reasons of backends that cannot run a case
UNFUSED = CaseProvider(lambda op: OPS[op].unfused, of_package=False)
DENSE = CaseProvider(lambda op: OPS[op].dense, "dense", of_package=False)


class Operands(NamedTuple):
    """Operands of a case's providers: in each copy, one problem per call."""

    low_rank: list[list[Problem]]
    dense: list[list[Problem]]

    def rotation(self, reads: str) -> Rotation[list[Problem]]:
        """A new rotation for one provider."""
        return Rotation(self.dense if reads == "dense" else self.low_rank)


def make_operands(case: GpuCase, device: torch.device, rotate_bytes: int) -> Operands:
    """Random operands in as many copies as fill ``rotate_bytes``, so that no call reads them from a cache."""
    first = [make_problem(op, shape, case.rows, case.dtype, device, pivoted=case.pivoted) for op, shape in case.parts]
    if case.storage:
        first = [quantized(problem, parse_storages(case.storage, len(problem.groups))) for problem in first]
    factors = sum(tensor.nbytes for problem in first for group in problem.groups for tensor in (group.U, group.Vh))
    weights = sum(weight.nbytes for problem in first for weight in problem.weights)
    copy = _packed if case.packed else partial(Problem.map, function=Tensor.clone)
    low_rank = [[copy(problem) for problem in first] for _ in range(-(-rotate_bytes // factors) or 1)]
    if not weights:
        return Operands(low_rank, low_rank)
    dense = [
        [problem._replace(weights=[weight.clone() for weight in problem.weights]) for problem in low_rank[0]]
        for _ in range(-(-rotate_bytes // weights) or 1)
    ]
    return Operands(low_rank, dense)


def _packed(problem: Problem) -> Problem:
    """Factors packed as in a model; equal U are slices of one tensor, which the stacked form needs."""
    if any(group.order is not None for group in problem.groups):
        Vhs = stack_rows([group.Vh for group in problem.groups])
        pairs = zip(problem.groups, Vhs, strict=True)
        return problem._replace(groups=[group._replace(U=pad_columns(group.U), Vh=Vh) for group, Vh in pairs])
    groups = pack_factors(problem.groups)
    if len({group.U.shape for group in groups}) == 1:
        Us = torch.stack([group.U for group in groups])
        groups = [group._replace(U=U) for group, U in zip(groups, Us, strict=True)]
    return problem._replace(groups=groups)


def providers(case: GpuCase, device: torch.device) -> Providers:
    """Backends, PyTorch forms, and paths of the Triton kernels without a grid barrier."""
    able, reasons = _backends(case, device)
    if case.storage:
        return {**able, "dense": DENSE}, reasons
    if all(op != "singular_value_grad" for op, _ in case.calls):
        able |= {f"triton {path}": CaseProvider(partial(_on_path, path)) for path in PATHS if path != "fused"}
    able["unfused"] = UNFUSED
    if case.packed and not case.pivoted and any(len(shape) > 1 and len(set(shape)) == 1 for _, shape in case.parts):
        able["stacked"] = CaseProvider(_stacked, of_package=False)
    able["dense"] = DENSE
    return able, reasons


def _barrier_providers(case: GpuCase, device: torch.device) -> Providers:
    """The Triton kernel whose programs wait for each other, which can hang, and the form that it is compared with."""
    return {"triton fused": CaseProvider(partial(_on_path, "fused")), "unfused": UNFUSED}, {}


def _eager_providers(case: GpuCase, device: torch.device) -> Providers:
    """What users call from Python: the op that ``auto`` runs, eager and compiled, each backend, and plain PyTorch."""
    able, _ = _backends(case, device)
    if len(case.calls) == 1:  # compilations take seconds
        able |= {
            f"torch.compile{' ' * bool(mode)}{mode}": CaseProvider(functools.cache(partial(_compiled_op, mode)))
            for mode in ("", "reduce-overhead")
        }
    return {"unfused": UNFUSED, "auto": CaseProvider(partial(_on_backend, "auto")), **able, "dense": DENSE}, {}


def _compiled_providers(case: GpuCase, device: torch.device) -> Providers:
    """Backends, and the unfused form compiled by ``torch.compile`` with its most thorough tuning."""
    torch.compiler.reset()

    def compile_one(op: str) -> Run:
        return torch.compile(OPS[op].unfused, fullgraph=True, dynamic=False, mode="max-autotune-no-cudagraphs")

    compiled = {"torch.compile max-autotune": CaseProvider(compile_one, of_package=False)}
    return {**_backends(case, device)[0], "unfused": UNFUSED, **compiled}, {}


PROVIDERS: dict[str, Callable[[GpuCase, torch.device], Providers]] = {  # by kind of measurement
    "graph": providers,  # replays of a CUDA graph
    "barrier": _barrier_providers,  # the same
    "compiled": _compiled_providers,  # the same
    "eager": _eager_providers,  # calls from Python
}


class _OpModule(nn.Module):
    """An op with its factors as parameters: CUDA graphs copy what is no parameter at every call."""

    def __init__(self, op: str, problem: Problem) -> None:
        super().__init__()
        self.op = op
        tensors = (tensor for group in problem.groups for tensor in (group.U, group.Vh))
        self.factors = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)

    def forward(self, x: Tensor, grad_y: Tensor) -> list[Tensor]:
        Us, Vhs = list(self.factors[::2]), list(self.factors[1::2])
        groups = [Factors(U, None, Vh, None) for U, Vh in zip(Us, Vhs, strict=True)]
        return OPS[self.op].run("auto", Problem(x, groups, [], grad_y))


def _compiled_op(mode: str, op: str) -> Run:
    """An op compiled in a mode of ``torch.compile``, for the factors of the first call."""
    modules: list[Callable[[Tensor, Tensor], list[Tensor]]] = []

    def run(problem: Problem) -> list[Tensor]:
        if not modules:
            modules.append(torch.compile(_OpModule(op, problem), fullgraph=True, dynamic=False, mode=mode or None))
        torch.compiler.cudagraph_mark_step_begin()
        return modules[0](problem.x, problem.grad_y)

    return run


def complaint(case: GpuCase, provider: CaseProvider, operands: Operands) -> str | None:
    """The error of a provider's results at this shape, or ``None``."""
    with poisoned():
        for (op, _), problem in zip(case.calls, operands.rotation(provider.reads).copies[0], strict=True):
            if (error := wrong(op, problem, provider.run(op), of_package=provider.of_package)) is not None:
                return f"{op}: {error}"
    return None


@contextmanager
def poisoned() -> Iterator[None]:
    """Fill the result of ``torch.empty`` with NaN: that memory may hold the right result of another provider."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def _backends(case: GpuCase, device: torch.device) -> Providers:
    """Rows of the dispatch table that run every call, without the reference, which equals ``unfused``."""
    probe = Problem(torch.empty(case.rows, 1, dtype=case.dtype, device=device), [], [], torch.empty(0))
    reasons: dict[str, str] = {}
    able: list[set[str]] = []
    for op, shape in case.parts:
        runs, refused = backends(op, shape, probe, pivoted=case.pivoted, weights=case.weights)
        able.append(set(runs))
        reasons |= refused
    names = set.intersection(*able) - {"reference"}
    return {name: CaseProvider(partial(_on_backend, name)) for name in sorted(names)}, reasons


def _on_backend(backend: str, op: str) -> Run:
    return partial(OPS[op].run, backend)


def _on_path(path: str, op: str) -> Run:
    """Run an op's Triton kernel on a path, or on the chosen path if this one does not serve the call.

    Where matrix products are chosen, the pair has the blocks of the most rows for which it is chosen.
    """
    kernel = "lowrank_glu" if op == "lowrank_glu" else "lowrank_linear"

    def run(problem: Problem) -> list[Tensor]:
        x, groups = problem.x, [widened(group, pivoted=True) for group in problem.groups]
        key = lowrank_linear.launch_key(x, groups)
        config = choose(kernel, gpu_of(x.device), key)
        small = key
        while path == "pair" and config.path == "gemms" and small.rows > 1:
            small = small._replace(rows=small.rows // 2)
            config = choose(kernel, gpu_of(x.device), small)
        if config.path != path and serves(forced := on_path(config, path, key), key):
            config = forced
        if op == "lowrank_glu":
            return [lowrank_glu.run(x, groups[0], groups[1], "silu", config)]
        return lowrank_linear.run(x, groups, config)

    return run


def _stacked(op: str) -> Run:
    """Plain PyTorch with Vh stacked into one matmul, and a batched matmul for U if all have the same shape."""

    def linears(problem: Problem) -> Sequence[Tensor]:
        groups: Any = problem.groups
        whole = stacked([group.Vh for group in groups])
        assert whole is not None
        h = F.linear(problem.x, whole)
        if len({group.U.shape for group in groups}) > 1:
            parts = h.split([group.U.shape[1] for group in groups], dim=1)
            return [F.linear(part, group.U) for part, group in zip(parts, groups, strict=True)]
        N, R = groups[0].U.shape
        U = groups[0].U.as_strided((len(groups), N, R), (N * R, R, 1))
        return torch.bmm(h.view(-1, len(groups), R).transpose(0, 1), U.mT).unbind()

    def run(problem: Problem) -> list[Tensor]:
        if op == "singular_value_grad":
            return OPS[op].unfused(problem)
        if op == "lowrank_glu":
            gate, up = linears(problem)
            return [F.silu(gate) * up]
        return list(linears(problem))

    return run
