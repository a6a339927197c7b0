"""Which backend runs a call, and why the others do not: one table, first row without an objection."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grasp_kernels.extension import module_missing

OPS = ("lowrank_linear", "lowrank_linear_grouped", "lowrank_glu", "singular_value_grad")


class BackendUnavailableError(RuntimeError):
    """A backend that was asked for by name cannot run this call; the message has its reason."""


class Call(NamedTuple):
    """What a row of the table may look at."""

    op: str
    device: torch.device
    dtype: torch.dtype
    rows: int  # tokens: the product of the input's leading dimensions
    rank: int  # the largest of the group


@dataclass(frozen=True)
class Backend:
    """One row: where the functions are, what the machine lacks (asked once), what a call may not be.

    ``avoids`` is what a backend can run, but runs only for whoever names it: ``"auto"`` passes it by.
    """

    name: str
    functions: Mapping[str, str]  # op → "module:function"
    missing: Callable[[], str | None]
    refuses: Callable[[Call], str | None]  # a pure function: its answer to a call is kept
    avoids: Callable[[Call], str | None]  # likewise


def _nothing(*_: object) -> None:
    return None


CUDA_ROWS = 16  # GRASP_CUDA_MAX_ROWS in csrc/lowrank.h


def _cuda_missing() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return module_missing("grasp_kernels._cuda", "nvcc")


def _cuda_refuses(call: Call) -> str | None:
    if call.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {call.device.type}"
    if call.dtype == torch.float64:
        return "its kernels accumulate in float32"
    if call.rows > CUDA_ROWS:
        return f"it serves at most {CUDA_ROWS} rows"
    return _card_refuses(call.device)


def _card_refuses(device: torch.device) -> str | None:
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0 or later, this card has {major}.{minor}"


def _triton_interprets() -> bool:
    return bool(importlib.import_module("grasp_kernels.triton.tiles").INTERPRETED.value)


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _triton_interprets() or (torch.version.cuda is not None and torch.cuda.is_available()):
        return None
    return "there is no CUDA GPU (with TRITON_INTERPRET=1 set, Triton interprets its kernels on the CPU, for tests)"


def _triton_refuses(call: Call) -> str | None:
    if call.dtype == torch.float64:
        return "its kernels accumulate in float32"
    if _triton_interprets() and call.device.type in ("cpu", "cuda"):
        return None
    if call.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {call.device.type}"
    return _card_refuses(call.device)


def _triton_avoids(call: Call) -> str | None:
    return "interpreted kernels run only when named" if _triton_interprets() else None


# Rows of x up to which the CPU kernels were measured to be no slower than PyTorch's matrix products, with AVX-512.
CPU_ROWS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 64}


def _cpu_missing() -> str | None:
    reason = module_missing("grasp_kernels._cpu", "Linux and a C++ compiler")
    if reason is None and not importlib.import_module("grasp_kernels._cpu").has_threads():
        return "PyTorch's OpenMP runtime does not lend its threads: it has no GOMP_parallel"
    return reason


def _cpu_refuses(call: Call) -> str | None:
    if call.device.type != "cpu":
        return f"it runs on CPU tensors, not on {call.device.type}"
    return "its kernels accumulate in float32" if call.dtype == torch.float64 else None


def _cpu_avoids(call: Call) -> str | None:
    if call.op == "singular_value_grad" or call.rows <= CPU_ROWS[call.dtype]:
        return None
    return f"beyond {CPU_ROWS[call.dtype]} rows PyTorch's matrix products are faster"


_CPU_FUNCTIONS = {
    "lowrank_linear": "grasp_kernels.cpu:lowrank_linear",
    "lowrank_linear_grouped": "grasp_kernels.cpu:lowrank_linear_grouped",
    "lowrank_glu": "grasp_kernels.cpu:lowrank_glu",
    "singular_value_grad": "grasp_kernels.routes:chunked",
}
_CUDA_FUNCTIONS = {
    "lowrank_linear": "grasp_kernels.cuda:lowrank_linear",
    "lowrank_linear_grouped": "grasp_kernels.cuda:lowrank_linear_grouped",
}
_TRITON_FUNCTIONS = {
    "lowrank_linear": "grasp_kernels.triton.lowrank_linear:lowrank_linear",
    "lowrank_linear_grouped": "grasp_kernels.triton.lowrank_linear:lowrank_linear_grouped",
    "lowrank_glu": "grasp_kernels.triton.lowrank_glu:lowrank_glu",
    "singular_value_grad": "grasp_kernels.triton.singular_value_grad:singular_value_grad",
}

BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", _CUDA_FUNCTIONS, missing=_cuda_missing, refuses=_cuda_refuses, avoids=_nothing),
    Backend("triton", _TRITON_FUNCTIONS, missing=_triton_missing, refuses=_triton_refuses, avoids=_triton_avoids),
    Backend("cpu", _CPU_FUNCTIONS, missing=_cpu_missing, refuses=_cpu_refuses, avoids=_cpu_avoids),
    Backend("reference", {op: f"grasp_kernels.reference:{op}" for op in OPS}, _nothing, _nothing, _nothing),
)


@functools.cache
def backend_missing(name: str) -> str | None:
    """Why this machine cannot run a backend at all, or ``None`` where it can."""
    return _row(name).missing()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run, in the order in which ``"auto"`` tries them."""
    return tuple(row.name for row in BACKENDS if backend_missing(row.name) is None)


def objection(row: Backend, call: Call, *, named: bool = True) -> str | None:
    """Why ``row`` does not run ``call``, for who names it or for ``"auto"``; ``None`` where it does."""
    if call.op not in row.functions:
        return f"has no {call.op}"
    return backend_missing(row.name) or row.refuses(call) or (None if named else row.avoids(call))


@functools.lru_cache(maxsize=4096)
def select(backend: str, op: str, device: torch.device, dtype: torch.dtype, rows: int, rank: int) -> Callable[..., Any]:
    """The function that runs a call; answers are kept, for every call asks. The arguments are those of ``Call``.

    Raises:
        ValueError: if ``backend`` is no row of the table.
        BackendUnavailableError: if a named backend objects.
    """
    call = Call(op, device, dtype, rows, rank)
    if backend == "auto":
        row = next(row for row in BACKENDS if objection(row, call, named=False) is None)
    else:
        row = _row(backend)
        if (reason := objection(row, call)) is not None:
            raise BackendUnavailableError(
                f"backend {backend!r} cannot run {_describe(call)}: {reason}. "
                "Pass backend='auto' to let the table choose."
            )
    return _load(row.functions[call.op])


def explain(
    op: str,
    *,
    rows: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> dict[str, str]:
    """Say for each backend why it does not run a call, or that it is ``"chosen"``; later ones are ``"not reached"``.

    Args:
        op: an op's name, such as ``"lowrank_linear"``.
        rows: tokens in the call.
        rank: the largest rank of the group.
        dtype: dtype of the input.
        device: device of the input.

    Raises:
        ValueError: if ``op`` is no op.
    """
    if op not in OPS:
        raise ValueError(f"unknown op {op!r}; the ops are {', '.join(OPS)}")
    call = Call(op, torch.device(device), dtype, rows, rank)
    answers: dict[str, str] = {}
    chosen = False
    for row in BACKENDS:
        reason = objection(row, call, named=False)
        answers[row.name] = reason or ("not reached" if chosen else "chosen")
        chosen = chosen or reason is None
    return answers


def _row(name: str) -> Backend:
    for row in BACKENDS:
        if row.name == name:
            return row
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(row.name for row in BACKENDS)}")


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module), function)


def _describe(call: Call) -> str:
    return f"{call.op} on {call.device.type} in {call.dtype} with {call.rows} rows and rank {call.rank}"
