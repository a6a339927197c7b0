"""Time every op on every backend against a dense linear, two unfused ones, and those compiled by PyTorch.

A provider is timed only where its result at that very shape is right, by the tolerance rule of the tests. Weights
rotate through more memory than a cache holds, providers take turns, and the floor is what the bytes and FLOPs cost at
the bandwidth and speed that were measured in the same run.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from grasp.bench.conditions import conditions, measure_card
from grasp.bench.providers import require_backends
from grasp.bench.results import NotMeasured, OpResult
from grasp.bench.shapes import model_calls
from grasp.bench.timing import batch, interleave
from grasp.bench.workloads import OPS, Problem, Run, backends, compiled, make_problem, rotations, wrong
from grasp.loading import DTYPES, find_device
from grasp.progress import Progress, no_progress
from grasp_kernels import roofline
from grasp_kernels.roofline import Card
from grasp_kernels.shapes import GroupShape, format_shape, parse_shape

# Llama-2-7B's q/k/v/o and gate/up, SmolLM2-135M's gate/up, with a tenth of the parameters kept.
DEFAULT_SHAPES = ("4096x4096r204", "4096x11008r298", "576x1536r41")
UNFUSED, COMPILED, DENSE = "unfused", "compiled", "dense"
RETAIN_RATIO = 0.1  # the paper's


class Case(NamedTuple):
    """One op at one shape; what its providers are compared at."""

    op: str
    shape: GroupShape
    rows: int
    dtype: torch.dtype
    model: str | None = None  # whose shape it is


@dataclass(frozen=True)
class Request:
    """What is to be measured; where names are left out, all of them.

    Attributes:
        ops: names of ops.
        shapes: as ``grasp_kernels.shapes.parse_shape`` reads them.
        model: take the shapes of this one, see ``grasp.bench.shapes.model_calls``.
        retain_ratio: that sets the ranks of the model's shapes.
        rows: tokens per call.
        dtypes: of inputs and factors.
        backends: of the dispatch table.
        compiled: whether to time what ``torch.compile`` makes of the unfused form.
        device: ``None`` for CUDA where there is a GPU, else the CPU.
        threads: of the CPU, each in turn; ``None`` for PyTorch's choice.
        rotate_bytes: of distinct weights that calls go through.
        repetitions: times that every provider gets its turn.
    """

    ops: Sequence[str] = ()
    shapes: Sequence[str] = ()
    model: str | None = None
    retain_ratio: float | None = None
    rows: Sequence[int] = (1, 16)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    backends: Sequence[str] = ()
    compiled: bool = True
    device: str | None = None
    threads: Sequence[int] | None = None
    rotate_bytes: int = 1 << 30
    repetitions: int = 20


class Round(NamedTuple):
    """What one case gave, or what was found before the first."""

    records: list[OpResult | NotMeasured]
    cards: dict[str, Card]  # by dtype, that the floors are of
    threads: int | None  # of a CPU


def run(request: Request, *, progress: Progress = no_progress) -> Iterator[Round]:
    """Measure case by case. What is wrong with the request is found before the first.

    Raises:
        ValueError: if a name, shape, number or device is none there is.
        GraspError: as ``model_calls`` does.
    """
    for names, known, what in ((request.ops, OPS, "op"), (request.dtypes, DTYPES, "dtype")):
        _require_known(names, list(known), what)
    require_backends(request.backends)
    for name, numbers in (("rows", request.rows), ("threads", request.threads or (1,))):
        if min(numbers) < 1:
            raise ValueError(f"{name} must be at least 1, got {min(numbers)}")
    if request.repetitions < 1 or request.rotate_bytes < 0:
        raise ValueError(
            f"repetitions must be at least 1 and rotated bytes not negative, got {request.repetitions} and "
            f"{request.rotate_bytes}"
        )
    device, todo = find_device(request.device), list(cases(request))
    return _rounds(request, device, todo, progress)


def _rounds(
    request: Request, device: torch.device, todo: Sequence[Case | NotMeasured], progress: Progress
) -> Iterator[Round]:
    measurable = [case for case in todo if isinstance(case, Case)]
    before = torch.get_num_threads()
    counts: Sequence[int | None] = (request.threads or [before]) if device.type == "cpu" else [None]
    yield Round([case for case in todo if isinstance(case, NotMeasured)], {}, None)
    try:
        for count in counts:
            torch.set_num_threads(count or before)
            cards = {name: measure_card(device, DTYPES[name]) for name in request.dtypes}
            for number, case in enumerate(measurable, start=1):
                step = f"case {number} of {len(measurable)}: {case.op}"
                progress(step, 0, 1)  # a bar that moves would take time from what is timed
                records = list(measure(case, device, cards[_name(case.dtype)], request))
                progress(step, 1, 1)
                yield Round(records, cards, count)
    finally:
        torch.set_num_threads(before)


def cases(request: Request) -> Iterator[Case | NotMeasured]:
    """Every op at every shape, number of rows and dtype."""
    wanted = request.ops or list(OPS)
    if request.model is not None:
        if request.shapes:
            raise ValueError("shapes are either given or a model's, got both; leave one out")
        ratio = RETAIN_RATIO if request.retain_ratio is None else request.retain_ratio
        found: list[tuple[str, str, GroupShape | None]] = [
            (op, format_shape(shape), shape) for op, shape in model_calls(request.model, ratio) if op in wanted
        ]
    elif request.retain_ratio is not None:
        raise ValueError("retain_ratio sets the ranks of a model's shapes; shapes that are given have their own")
    else:
        texts = request.shapes or DEFAULT_SHAPES
        found = [(op, text, OPS[op].fit(parse_shape(text))) for op, text in itertools.product(wanted, texts)]
    for (op, text, shape), rows, dtype in itertools.product(found, request.rows, request.dtypes):
        if shape is None:
            labels: dict[str, Any] = {"op": op, "shape": text, "rows": rows, "dtype": dtype}
            yield NotMeasured("ops", "*", "the op takes no such shape", model=request.model, **labels)
        else:
            yield Case(op, shape, rows, DTYPES[dtype], request.model)


def floor_seconds(case: Case, provider: str, card: Card) -> float | None:
    """What ``provider`` takes at least on ``card``; ``None`` for the dense gradient, whose cost no one would pay."""
    op, itemsize = OPS[case.op], case.dtype.itemsize
    if provider != DENSE:
        return roofline.floor(card, *op.cost(case.rows, case.shape, itemsize))
    if case.op == "singular_value_grad":
        return None
    costs = [roofline.dense_linear(case.rows, N, K, itemsize=itemsize) for K, N, _ in case.shape]
    return roofline.floor(card, *itertools.chain(*costs))


@torch.inference_mode()
def measure(case: Case, device: torch.device, card: Card, request: Request) -> Iterator[OpResult | NotMeasured]:
    """Check and time one case: its backends and the baselines."""
    problem = make_problem(case.op, case.shape, case.rows, case.dtype, device)
    labels: dict[str, Any] = {
        "op": case.op,
        "shape": format_shape(case.shape),
        "rows": case.rows,
        "dtype": _name(case.dtype),
        "model": case.model,
    }
    timed, left_out = _providers(case, problem, request)
    for name, (reason, is_wrong) in left_out.items():
        yield NotMeasured("ops", name, reason, is_wrong, **labels)
    rotation = rotations(case.op, problem, request.rotate_bytes)
    sources = {name: rotation["dense" if name == DENSE else "low-rank"] for name in timed}
    batches = {name: batch(device, call, sources[name]) for name, call in timed.items()}
    samples = interleave(batches, request.repetitions)
    now = conditions(card, device)
    for name, sample in samples.items():
        floor = floor_seconds(case, name, card)
        yield OpResult(
            provider=name,
            **labels,
            median_us=sample.median * 1e6,
            spread=sample.spread,
            floor_us=None if floor is None else floor * 1e6,
            share_of_floor=None if floor is None else floor / sample.median,
            speedup_over_unfused=sample.speedup_over(samples[UNFUSED]),
            speedup_over_dense=sample.speedup_over(samples[DENSE]),
            repetitions=request.repetitions,
            calls_per_repetition=batches[name].calls,
            rotated_copies=len(sources[name].copies),
            conditions=now,
        )


def _providers(case: Case, problem: Problem, request: Request) -> tuple[dict[str, Run], dict[str, tuple[str, bool]]]:
    """What is to be timed, and what is not: the reason, and whether it is a wrong result."""
    runs, reasons = backends(case.op, case.shape, problem)
    asked = {name for name in (*runs, *reasons) if not request.backends or name in request.backends}
    left_out = {name: (reason, False) for name, reason in reasons.items() if name in asked}
    candidates = {name: run for name, run in runs.items() if name in asked}
    if request.compiled:
        try:
            candidates[COMPILED] = compiled(case.op, problem)
        except RuntimeError as error:  # all that PyTorch's compilers raise
            left_out[COMPILED] = f"torch.compile: {' '.join(str(error).split())[:200]}", False
    else:
        left_out[COMPILED] = "left out on request", False
    timed: dict[str, Run] = {}
    for name, candidate in candidates.items():
        complaint = wrong(case.op, problem, candidate, own=name != COMPILED)
        if complaint is None:
            timed[name] = candidate
        else:
            left_out[name] = complaint, True
    return {**timed, UNFUSED: OPS[case.op].unfused, DENSE: OPS[case.op].dense}, left_out


def _require_known(names: Sequence[str], known: Sequence[str], what: str) -> None:
    for name in names:
        if name not in known:
            raise ValueError(f"unknown {what} {name!r}; expected one of {', '.join(known)}")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
