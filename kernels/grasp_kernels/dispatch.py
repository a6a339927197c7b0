"""The dispatch table: which backend runs a call, by which path, and why the others do not."""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from .checks import DTYPES
from .extension import module_missing
from .quantized import KINDS

LINEARS = ("lowrank_linear", "lowrank_linear_grouped")  # which one function runs, on a group of one or more
OPS = (*LINEARS, "lowrank_glu", "singular_value_grad")


class BackendUnavailableError(RuntimeError):
    """The backend that was named cannot run this call; the message has its reason.

    Example:
        >>> import torch
        >>> from grasp_kernels import lowrank_linear
        >>> lowrank_linear(torch.ones(1, 8), torch.ones(4, 2), None, torch.ones(2, 8), backend="cuda")
        Traceback (most recent call last):
        grasp_kernels.dispatch.BackendUnavailableError: backend 'cuda' cannot run lowrank_linear on cpu ...
    """


class OpCall(NamedTuple):
    """The properties of a call that a row of the table decides by."""

    op: str
    device: torch.device
    dtype: torch.dtype
    rows: int  # tokens: the product of the input's leading dimensions
    rank: int  # the largest of the group
    pivoted: bool = False  # a group has pivoted factors
    weights: frozenset[str] = frozenset()  # the quantised forms that factors have: "int8", "int4", "fp8"


@dataclass(frozen=True)
class Backend:
    """One row of the table. Each function returns a reason, or ``None`` if it has none.

    ``missing`` is called once: does this machine lack something? ``refuses``: can the backend not run the call?
    ``avoids``: should ``"auto"`` pass over a call that the backend can run? A named backend ignores ``avoids``.
    """

    name: str
    functions: Mapping[str, str]  # op → ".module:function"
    missing: Callable[[], str | None]
    refuses: Callable[[OpCall], str | None]  # a pure function: its answers are cached by ``bucket``
    avoids: Callable[[OpCall], str | None]  # a pure function: its answers are cached by ``bucket``


def _nothing(*_: object) -> None:
    return None


LEAST_CAPABILITY, FP8_CAPABILITY = (8, 0), (8, 9)  # Triton does not compile fp8 for earlier GPUs
CUDA_ROWS = 16  # GRASP_CUDA_MAX_ROWS in csrc/lowrank.h
CUDA_FASTEST_ROWS = 4  # above, triton's dots in 16 bits are expected to be faster: see docs/kernels.md


def _cuda_missing() -> str | None:
    if torch.version.cuda is None or not torch.cuda.is_available():
        return "there is no CUDA GPU"
    return module_missing(f"{__package__}._cuda", "nvcc")


def _cuda_refuses(call: OpCall) -> str | None:
    if call.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {call.device.type}"
    if call.dtype == torch.float64:
        return "its kernels accumulate in float32"
    if "fp8" in call.weights:
        return "it has no kernel for fp8 factors"
    if call.weights and call.dtype == torch.float32:
        return f"it has kernels for {' and '.join(sorted(call.weights))} factors in 16 bits only"
    if call.rows > CUDA_ROWS:
        return f"it serves at most {CUDA_ROWS} rows"
    return _card_refuses(call.device)


def cuda_rows(dtype: torch.dtype) -> int:
    """Most rows of x that ``"auto"`` gives to ``cuda``: all that it serves, if ``triton`` cannot run more of them."""
    if dtype == torch.float32 or backend_missing("triton") is not None or _triton_interprets():
        return CUDA_ROWS
    return CUDA_FASTEST_ROWS


def _cuda_avoids(call: OpCall) -> str | None:
    rows = cuda_rows(call.dtype)
    if call.weights and call.rank % 16 and rows < CUDA_ROWS:
        return "it reads quantised factors of a rank that is no multiple of 16 byte by byte, so triton should be faster"
    return None if call.rows <= rows else f"beyond {rows} rows triton is expected to be faster"


def _card_refuses(device: torch.device, least: tuple[int, int] = LEAST_CAPABILITY) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability >= least:
        return None
    purpose = " for fp8 factors" if least == FP8_CAPABILITY else ""
    needed, found = (f"{major}.{minor}" for major, minor in (least, capability))
    return f"it needs compute capability {needed} or later{purpose}, this card has {found}"


def _triton_interprets() -> bool:
    return bool(importlib.import_module(".triton.tiles", __package__).INTERPRETED.value)


def _triton_missing() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if _triton_interprets() or (torch.version.cuda is not None and torch.cuda.is_available()):
        return None
    return "there is no CUDA GPU (with TRITON_INTERPRET=1 set, Triton interprets its kernels on the CPU, for tests)"


def _triton_refuses(call: OpCall) -> str | None:
    if call.dtype == torch.float64:
        return "its kernels accumulate in float32"
    if _triton_interprets() and call.device.type in ("cpu", "cuda"):
        return None
    if call.device.type != "cuda":
        return f"it runs on CUDA tensors, not on {call.device.type}"
    return _card_refuses(call.device, FP8_CAPABILITY if "fp8" in call.weights else LEAST_CAPABILITY)


def _triton_avoids(call: OpCall) -> str | None:
    if _triton_interprets():
        return "interpreted kernels run only when named"
    if call.op != "singular_value_grad":
        return None
    slower = _load(".gradient_configs:slower")
    return slower(call.device, call.rows, call.rank, call.dtype)


# Most rows of x for which the CPU kernels are not slower than PyTorch's matrix products, measured with AVX-512.
DIRECT_GROUPS, DIRECT_DIMENSIONS = 8, 8  # MOST_GROUPS and MOST_DIMENSIONS in csrc/direct.h
CPU_ROWS = {torch.float32: 32, torch.float16: 32, torch.bfloat16: 64}
CPU_ROWS_QUANTIZED = {torch.float32: 128, torch.float16: 256, torch.bfloat16: 256}  # PyTorch dequantises first


def _cpu_missing() -> str | None:
    reason = module_missing(f"{__package__}._cpu", "Linux and a C++ compiler")
    if reason is None and not importlib.import_module("._cpu", __package__).has_threads():
        return "PyTorch's OpenMP runtime has no GOMP_parallel, through which the kernels use its threads"
    return reason


def _cpu_refuses(call: OpCall) -> str | None:
    if call.device.type != "cpu":
        return f"it runs on CPU tensors, not on {call.device.type}"
    if "fp8" in call.weights:
        return "it has no kernel for fp8 factors"
    return "its kernels accumulate in float32" if call.dtype == torch.float64 else None


def _cpu_avoids(call: OpCall) -> str | None:
    # PyTorch's products of pivoted factors need a second pass, which permutes the columns of y.
    faster = call.op == "singular_value_grad" or (call.pivoted and not call.weights)
    most = (CPU_ROWS_QUANTIZED if call.weights else CPU_ROWS)[call.dtype]
    return None if faster or call.rows <= most else f"beyond {most} rows PyTorch's matrix products are faster"


_CPU_FUNCTIONS = {
    **dict.fromkeys(LINEARS, ".cpu:run"),
    "lowrank_glu": ".cpu:lowrank_glu",
    "singular_value_grad": ".routes:chunked",
}
_CUDA_FUNCTIONS = dict.fromkeys(LINEARS, ".cuda:run")
_TRITON_FUNCTIONS = {
    **dict.fromkeys(LINEARS, ".triton.lowrank_linear:lowrank_linear_grouped"),
    "lowrank_glu": ".triton.lowrank_glu:lowrank_glu",
    "singular_value_grad": ".triton.singular_value_grad:singular_value_grad",
}
_CHUNKED_FUNCTIONS = {"singular_value_grad": ".routes:chunked"}
_REFERENCE_FUNCTIONS = {op: ".reference:lowrank_linear_grouped" if op in LINEARS else f".reference:{op}" for op in OPS}

BACKENDS: tuple[Backend, ...] = (
    Backend("cuda", _CUDA_FUNCTIONS, missing=_cuda_missing, refuses=_cuda_refuses, avoids=_cuda_avoids),
    Backend("triton", _TRITON_FUNCTIONS, missing=_triton_missing, refuses=_triton_refuses, avoids=_triton_avoids),
    Backend("cpu", _CPU_FUNCTIONS, missing=_cpu_missing, refuses=_cpu_refuses, avoids=_cpu_avoids),
    Backend("chunked", _CHUNKED_FUNCTIONS, _nothing, _nothing, _nothing),
    Backend("reference", _REFERENCE_FUNCTIONS, _nothing, _nothing, _nothing),
)


@functools.cache
def backend_missing(name: str) -> str | None:
    """The reason why this machine cannot run a backend at all, or ``None`` if it can."""
    return _row(name).missing()


def available_backends() -> tuple[str, ...]:
    """Names of the backends that this machine can run, in the order in which ``"auto"`` tries them.

    Example:
        >>> from grasp_kernels import available_backends
        >>> available_backends()[-1]  # plain PyTorch runs everywhere
        'reference'
    """
    return tuple(row.name for row in BACKENDS if backend_missing(row.name) is None)


def objection(row: Backend, call: OpCall, *, named: bool = True) -> str | None:
    """The reason why ``row`` does not run ``call``, or ``None`` if it does.

    Args:
        row: a row of the table.
        call: the call.
        named: the caller names this backend; ``False``: ``"auto"`` asks, so the row may also avoid the call.
    """
    if call.op not in row.functions:
        return f"has no {call.op}"
    return backend_missing(row.name) or row.refuses(call) or (None if named else row.avoids(call))


def check_backend(name: str) -> None:
    """Check that ``name`` is ``"auto"`` or a row of the table.

    Raises:
        TypeError: if it is not a string.
        ValueError: if it is not a name of the table.
    """
    if not isinstance(name, str):
        raise TypeError(f"backend must be a string, got {type(name).__name__}")
    if name != "auto":
        _row(name)


def select(
    backend: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    rank: int,
    pivoted: bool = False,
    weights: frozenset[str] = frozenset(),
) -> Callable[..., Any]:
    """The function that runs a call; answers are cached, because every call asks. See ``OpCall`` for the arguments.

    Raises:
        ValueError: if ``backend`` is not a row of the table.
        BackendUnavailableError: if a named backend objects.
    """
    function = _select(backend, op, device, dtype, bucket(rows), rank, pivoted, weights)
    if function is None:
        call = OpCall(op, device, dtype, rows, rank, pivoted, weights)
        raise BackendUnavailableError(
            f"backend {backend!r} cannot run {_describe(call)}: {objection(_row(backend), call)}. "
            "Pass backend='auto' to let the table choose."
        )
    return function


def bucket(rows: int) -> int:
    """Rows with the same answers of the table, few enough for a cache: above 64, the next power of two."""
    return rows if rows <= 64 else 1 << (rows - 1).bit_length()


@functools.lru_cache(maxsize=4096)
def _select(
    backend: str,
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    rank: int,
    pivoted: bool,
    weights: frozenset[str],
) -> Callable[..., Any] | None:
    """The function that runs a call, or ``None`` if the named backend objects."""
    call = OpCall(op, device, dtype, rows, rank, pivoted, weights)
    row = chosen_row(call) if backend == "auto" else _row(backend)
    if backend != "auto" and objection(row, call) is not None:
        return None
    return _load(row.functions[call.op])


def explain(
    op: str,
    *,
    rows: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    groups: int = 1,
    pivoted: bool = False,
    weights: Collection[str] = (),
) -> dict[str, str]:
    """Say which backend ``"auto"`` gives a call to, by which path the call gets there, and why not otherwise.

    Args:
        op: the name of an op, such as ``"lowrank_linear"``.
        rows: tokens in the call.
        rank: the largest rank of the group.
        dtype: dtype of the input.
        device: device of the input.
        groups: number of factors that share the input.
        pivoted: whether any of them are.
        weights: how they are quantised: some of ``"int8"``, ``"int4"`` and ``"fp8"``.

    Returns:
        For each backend ``"chosen"``, ``"not reached"`` or the reason why it does not run the call. ``"path"`` starts
        with ``"direct"`` if a compiled op runs the call without PyTorch's dispatcher, else with ``"registered op"``.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if ``op`` is not an op, no op takes the dtype, PyTorch has no such device, or a number is too small.

    Example:
        >>> from grasp_kernels import explain
        >>> answers = explain("lowrank_linear", rows=4096, rank=8)
        >>> answers["cpu"], answers["reference"], answers["path"]
        (..., 'chosen', 'registered op: reference has no direct path')
    """
    if not isinstance(weights, list | tuple | set | frozenset) or not all(isinstance(name, str) for name in weights):
        raise TypeError(f"weights must be a list of names such as ['int8'], got {type(weights).__name__}")
    if isinstance(op, str) and op == "lowrank_linear_merged":
        op = "lowrank_linear_grouped"  # whose kernels it runs
    call = OpCall(op, _to_device(device), dtype, rows, rank, pivoted, frozenset(weights))
    _check_call(call, groups)
    answers: dict[str, str] = {}
    chosen: Backend | None = None
    for row in BACKENDS:
        reason = objection(row, call, named=False)
        answers[row.name] = reason or ("not reached" if chosen else "chosen")
        chosen = chosen or (row if reason is None else None)
    if chosen is not None:
        answers["path"] = _explain_path(chosen, call, groups)
    return answers


def _to_device(device: torch.device | str) -> torch.device:
    if not isinstance(device, torch.device | str):
        raise TypeError(f"device must be a torch.device or a string, got {type(device).__name__}")
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"unknown device {device!r}; expected a name such as 'cpu' or 'cuda:0'") from error


def _check_call(call: OpCall, groups: int) -> None:
    """Check the arguments of ``explain``."""
    for name, kind in (("op", str), ("dtype", torch.dtype), ("pivoted", bool)):
        if not isinstance(value := getattr(call, name), kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if call.op not in OPS:
        raise ValueError(f"unknown op {call.op!r}; the ops are {', '.join(OPS)}")
    if call.dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {call.dtype}")
    if unknown := sorted(call.weights - {*KINDS.values()}):
        raise ValueError(f"unknown weights {unknown[0]!r}; expected some of {', '.join(KINDS.values())}")
    for name, number, least in (("rows", call.rows, 0), ("rank", call.rank, 1), ("groups", groups, 1)):
        if not isinstance(number, int):
            raise TypeError(f"{name} must be an integer, got {type(number).__name__}")
        if number < least:
            raise ValueError(f"{name} must be at least {least}, got {number}")


def chosen_row(call: OpCall) -> Backend:
    """The row that ``"auto"`` takes."""
    return next(row for row in BACKENDS if objection(row, call, named=False) is None)


def _explain_path(row: Backend, call: OpCall, groups: int) -> str:
    """The path of a call that ``"auto"`` gives to ``row``."""
    if row.name != "cpu":
        return f"registered op: {row.name} has no direct path"
    if call.op not in LINEARS:
        return f"registered op: the direct path of cpu has no {call.op}"
    if call.rows > (most := CPU_ROWS[call.dtype]):
        return f"registered op: the direct path takes at most {most} rows of {call.dtype}, not {call.rows}"
    if groups > DIRECT_GROUPS:
        return f"registered op: the direct path takes at most {DIRECT_GROUPS} groups, not {groups}"
    return (
        "direct: compiled, without PyTorch's dispatcher, unless a gradient is recorded, autocast, a mode, a transform "
        "or a tracer is active, the kernel cannot read a tensor in place, or x has more than "
        f"{DIRECT_DIMENSIONS} dimensions"
    )


def _row(name: str) -> Backend:
    for row in BACKENDS:
        if row.name == name:
            return row
    raise ValueError(f"unknown backend {name!r}; expected 'auto' or one of {', '.join(row.name for row in BACKENDS)}")


@functools.cache
def _load(path: str) -> Callable[..., Any]:
    module, _, function = path.partition(":")
    return getattr(importlib.import_module(module, __package__), function)


def _describe(call: OpCall) -> str:
    factors = f" of {' and '.join(sorted(call.weights))} factors" if call.weights else ""
    return f"{call.op}{factors} on {call.device.type} in {call.dtype} with {call.rows} rows and rank {call.rank}"
