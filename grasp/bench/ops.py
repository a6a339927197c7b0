"""Time every op on every backend against a dense linear, two plain linears, and these compiled by PyTorch.

A provider is timed only if its result at that shape passes the tolerance rule of the tests. Weights rotate through more
memory than a cache holds, and providers take turns. The floor is the time that the bytes and FLOPs of a call take at
the bandwidth and speed measured in the same run.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from grasp.bench.conditions import conditions, measure_card
from grasp.bench.memory import records_within_memory
from grasp.bench.providers import DENSE, UNFUSED, require_names
from grasp.bench.recorded import RecordedCall, WorkloadResult
from grasp.bench.recording import read_recording
from grasp.bench.records import NotMeasured, OpResult
from grasp.bench.schema import Record
from grasp.bench.shapes import model_calls
from grasp.bench.timing import interleave
from grasp.bench.workloads import (
    ATTENTION,
    MLP,
    OPS,
    SMALL_MLP,
    Problem,
    Run,
    backends,
    compiled,
    low_rank_costs,
    make_problem,
    quantized,
    rotation,
    wrong,
)
from grasp.formatting import one_line
from grasp.loading import DTYPES, find_device
from grasp.method.storage import FLOATING, STORAGES, Storage, format_storages, parse_storages
from grasp.progress import Progress, no_progress, one_step
from grasp_kernels import roofline
from grasp_kernels.dispatch import BACKENDS, OpCall, chosen_row
from grasp_kernels.roofline import Card
from grasp_kernels.shapes import GroupShape, format_forms, format_shape, parse_forms, parse_shape
from speedgate.timing import batch, using_threads

DEFAULT_SHAPES = (ATTENTION, MLP, SMALL_MLP)
COMPILED = "compiled"
GRADIENT = "singular_value_grad"
RETAIN_RATIO = 0.1  # the paper's
_BACKENDS = frozenset(row.name for row in BACKENDS)
ROWS, DEFAULT_DTYPES = (1, 16), ("float32", "bfloat16")


class OpCase(NamedTuple):
    """One op at one shape, number of rows and dtype, where its providers are compared."""

    op: str
    shape: GroupShape
    rows: int
    dtype: torch.dtype
    model: str | None = None  # that the shape was taken from
    pivoted: tuple[bool, ...] = ()  # of each linear; empty for none
    storages: tuple[Storage | None, ...] = ()  # of each linear; empty if none is quantised
    calls: int | None = None  # in the recorded workload

    @property
    def form(self) -> str:
        """As ``grasp_kernels.shapes.parse_forms`` reads it."""
        return format_forms(self.pivoted or (False,))

    @property
    def labels(self) -> dict[str, Any]:
        """The fields of its records."""
        shape, dtype = format_shape(self.shape), _name(self.dtype)
        return {"op": self.op, "shape": shape, "rows": self.rows, "dtype": dtype, "model": self.model}

    @property
    def weights(self) -> frozenset[str]:
        """The kinds of quantised factors, as the dispatch table calls them."""
        return frozenset(storage.numbers for storage in self.storages if storage is not None)


@dataclass(frozen=True)
class OpsRequest:
    """Settings of one run."""

    ops: Sequence[str] = ()  # names of ops; all if empty
    shapes: Sequence[str] = ()  # as ``grasp_kernels.shapes.parse_shape`` reads them; ``DEFAULT_SHAPES`` if empty
    model: str | None = None  # take the shapes of this model instead, see ``grasp.bench.shapes.model_calls``
    retain_ratio: float | None = None  # sets the ranks of the model's shapes; ``None`` for ``RETAIN_RATIO``
    workload: Path | None = None  # take the calls of this file of ``grasp bench record`` instead
    rows: Sequence[int] = ()  # tokens per call; ``ROWS`` if empty. Of a workload only these calls, all if empty.
    dtypes: Sequence[str] = ()  # of inputs and factors; ``DEFAULT_DTYPES`` if empty. Of a workload as ``rows``.
    # of all linears, ``factored`` or ``pivoted``; ``None`` for ``factored``, or as in the workload. A pivoted linear of
    # full rank is a dense one.
    form: str | None = None
    # of quantised factors, keys of ``STORAGES``; each is timed beside what ``auto`` runs with the floating factors.
    # Floating factors if empty.
    weights: Sequence[str] = ()
    backends: Sequence[str] = ()  # names in the dispatch table; all if empty
    compiled: bool = True  # whether to time the unfused form compiled by ``torch.compile``
    device: str | None = None  # ``None`` for CUDA if there is a GPU, else the CPU; the workload's if there is one
    threads: Sequence[int] | None = None  # numbers of CPU threads to run with; ``None`` for PyTorch's choice
    rotate_bytes: int = 1 << 30  # bytes of distinct weights that calls rotate through
    repetitions: int = 20  # turns of every provider


class Round(NamedTuple):
    """Records of one case; the first round has the shapes that an op does not take, the last a workload's totals."""

    records: list[Record]
    cards: dict[str, Card]  # by dtype; the floors are computed from them
    threads: int | None  # of a CPU


def run(request: OpsRequest, *, progress: Progress = no_progress) -> Iterator[Round]:
    """Check the request, then measure case by case.

    Raises:
        ValueError: if a name, shape or device is unknown or out of range.
        GraspError: as ``model_calls`` does.
    """
    require_names(request.ops, OPS, "op")
    require_names(request.dtypes, DTYPES, "dtype")
    require_names(request.weights, STORAGES, "weights")
    require_names(request.backends, [row.name for row in BACKENDS], "backend")
    if request.workload is None:
        device, todo = request.device, list(cases(request))
    else:
        device, todo = recorded_cases(request, request.workload)
    return _rounds(request, find_device(device), todo, progress)


def _rounds(
    request: OpsRequest, device: torch.device, todo: Sequence[OpCase | NotMeasured], progress: Progress
) -> Iterator[Round]:
    measurable = [case for case in todo if isinstance(case, OpCase)]
    counts: Sequence[int | None] = (request.threads or [torch.get_num_threads()]) if device.type == "cpu" else [None]
    yield Round([case for case in todo if isinstance(case, NotMeasured)], {}, None)
    for count in counts:
        with using_threads(count):
            cards = {
                _name(dtype): measure_card(device, dtype) for dtype in dict.fromkeys(case.dtype for case in measurable)
            }
            timed: list[list[OpResult]] = []
            for number, case in enumerate(measurable, start=1):
                with one_step(progress, f"case {number} of {len(measurable)}: {case.op}"):  # no bar moves meanwhile
                    too_large = NotMeasured("ops", "*", "the device has too little memory", **case.labels)
                    measured = measure(case, device, cards[_name(case.dtype)], request)
                    records: list[Record] = list(records_within_memory(measured, too_large))
                timed.append([record for record in records if isinstance(record, OpResult)])
                yield Round(records, cards, count)
            if request.workload is not None:
                yield Round([*totals(timed, request.workload.name)], cards, count)


def cases(request: OpsRequest) -> Iterator[OpCase | NotMeasured]:
    """Every op at every shape, number of rows and dtype."""
    wanted = request.ops or list(OPS)
    if request.model is not None:
        if request.shapes:
            raise ValueError("got both shapes and a model to take shapes from; leave one out")
        ratio = RETAIN_RATIO if request.retain_ratio is None else request.retain_ratio
        calls: list[tuple[str, str, GroupShape | None]] = [
            (op, format_shape(shape), shape) for op, shape in model_calls(request.model, ratio) if op in wanted
        ]
    elif request.retain_ratio is not None:
        raise ValueError("retain_ratio sets the ranks of a model's shapes; given shapes already have ranks")
    else:
        texts = request.shapes or DEFAULT_SHAPES
        calls = [(op, text, OPS[op].fit(parse_shape(text))) for op, text in itertools.product(wanted, texts)]
    [pivots] = parse_forms(request.form or "factored", 1)
    for (op, text, shape), rows, dtype, weights in itertools.product(
        calls, request.rows or ROWS, request.dtypes or DEFAULT_DTYPES, request.weights or (None,)
    ):
        labels: dict[str, Any] = {"op": op, "shape": text, "rows": rows, "dtype": dtype, "model": request.model}
        if shape is None:
            yield NotMeasured("ops", "*", "the op does not take this shape", **labels)
        elif op == GRADIENT and (pivots or weights):
            yield NotMeasured("ops", "*", "the op takes floating factors that are not pivoted", **labels)
        elif pivots and any(linear.R > linear.N for linear in shape):
            yield NotMeasured("ops", "*", "a pivoted linear has at most as many ranks as outputs", **labels)
        else:
            storages = (STORAGES[weights],) * len(shape) if weights else ()
            yield OpCase(op, shape, rows, DTYPES[dtype], request.model, (pivots,) * pivots * len(shape), storages)


def recorded_cases(request: OpsRequest, path: Path) -> tuple[str, list[OpCase | NotMeasured]]:
    """The device of a recorded workload, or of the request, and the calls that the request does not leave out.

    Raises:
        ValueError: if the request has shapes, a model, a form or weights as well, or no call is left, or there are
            several devices.
        ResultsError: as ``read_recording``.
    """
    if request.shapes or request.model is not None or request.retain_ratio is not None:
        raise ValueError("got a workload, and shapes or a model to take shapes from; leave one out")
    if request.form is not None or request.weights:
        raise ValueError("got a workload, whose calls have forms and weights, and a form or weights; leave one out")
    recorded = read_recording(path).calls
    wanted = ((request.ops, "op"), (request.rows, "rows"), (request.dtypes, "dtype"))
    kept = [call for call in recorded if all(not names or getattr(call, name) in names for names, name in wanted)]
    if not kept:
        raise ValueError(f"none of the {len(recorded)} different calls of {path} has such an op, rows and dtype")
    devices = sorted({call.device for call in kept})
    if request.device is None and len(devices) > 1:
        raise ValueError(f"{path} has calls on {' and '.join(devices)}; choose a device to time all of them on")
    counts: Counter[RecordedCall] = Counter()  # a call may be in the file captured and not captured
    for call in kept:
        counts[replace(call, device="", captured=False, count=0)] += call.count
    todo: list[OpCase | NotMeasured] = []
    for (op, text, form, rows, dtype, *_, weights), count in ((astuple(call), count) for call, count in counts.items()):
        shape = parse_shape(text)
        if dtype in DTYPES:
            storages = parse_storages(weights, len(shape)) if weights else ()
            forms = parse_forms(form, len(shape))
            todo.append(OpCase(op, shape, rows, DTYPES[dtype], None, forms, storages, calls=count))
        else:
            reason = f"{count} calls in {dtype}; expected {', '.join(DTYPES)}"
            todo.append(NotMeasured("ops", "*", reason, op=op, shape=text, rows=rows, dtype=dtype))
    return request.device or devices[0], todo


def floor_seconds(case: OpCase, provider: str, card: Card) -> float | None:
    """Least seconds of ``provider`` on ``card``; ``None`` for the dense gradient, which nobody would use."""
    itemsize = case.dtype.itemsize
    if provider != DENSE:
        storages = case.storages if provider in _BACKENDS else ()
        return roofline.floor(card, *low_rank_costs(case.op, case.shape, case.rows, itemsize, case.pivoted, storages))
    if case.op == GRADIENT:
        return None
    costs = [roofline.dense_linear(case.rows, N, K, itemsize=itemsize) for K, N, _ in case.shape]
    return roofline.floor(card, *itertools.chain(*costs))


@torch.inference_mode()
def measure(case: OpCase, device: torch.device, card: Card, request: OpsRequest) -> Iterator[OpResult | NotMeasured]:
    """Check and time one case: its backends and the baselines."""
    pivoted = case.pivoted or (False,) * len(case.shape)
    problem = make_problem(case.op, case.shape, case.rows, case.dtype, device, pivoted=pivoted)
    stored = quantized(problem, case.storages) if case.storages else problem
    rank = max(linear.R for linear in case.shape)
    chosen = chosen_row(OpCall(case.op, device, case.dtype, case.rows, rank, any(pivoted), case.weights)).name
    timed, left_out = _providers(case, problem, stored, request)
    for name, (reason, is_wrong) in left_out.items():
        yield NotMeasured("ops", name, reason, is_wrong, **case.labels)
    sources = dict.fromkeys(timed, rotation(case.op, problem, request.rotate_bytes))
    if stored is not problem:
        packed = rotation(case.op, stored, request.rotate_bytes)
        sources |= dict.fromkeys(timed.keys() & _BACKENDS, packed)
    if case.op != "singular_value_grad":  # which has no other operands
        sources[DENSE] = rotation(case.op, problem, request.rotate_bytes, dense=True)
    batches = {name: batch(device.type, call, sources[name]) for name, call in timed.items()}
    samples = interleave(batches, request.repetitions)
    now = conditions(card, device)
    for name, sample in samples.items():
        floor = floor_seconds(case, name, card)
        yield OpResult(
            provider=name,
            **case.labels,
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
            form=case.form,
            weights=format_storages([str(storage or "") for storage in case.storages]),
            calls=case.calls,
            chosen=name == chosen,
        )


def _providers(
    case: OpCase, problem: Problem, stored: Problem, request: OpsRequest
) -> tuple[dict[str, Run], dict[str, tuple[str, bool]]]:
    """Providers to time; and for the others the reason, and whether it is a wrong result."""
    runs, reasons = backends(case.op, case.shape, stored, pivoted=any(case.pivoted), weights=case.weights)
    requested = {name for name in (*runs, *reasons) if not request.backends or name in request.backends}
    left_out = {name: (reason, False) for name, reason in reasons.items() if name in requested}
    candidates = {name: run for name, run in runs.items() if name in requested}
    if stored is not problem:
        candidates[FLOATING] = partial(OPS[case.op].run, "auto")
    if request.compiled:
        try:
            candidates[COMPILED] = compiled(case.op, problem)
        except RuntimeError as error:  # the base class of what PyTorch's compilers raise
            left_out[COMPILED] = f"torch.compile: {one_line(error)}", False
    else:
        left_out[COMPILED] = "left out on request", False
    timed: dict[str, Run] = {}
    for name, candidate in candidates.items():
        operands = stored if name in _BACKENDS else problem
        complaint = wrong(case.op, operands, candidate, of_package=name != COMPILED)
        if complaint is None:
            timed[name] = candidate
        else:
            left_out[name] = complaint, True
    return {**timed, UNFUSED: OPS[case.op].unfused, DENSE: OPS[case.op].dense}, left_out


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def totals(cases: Sequence[Sequence[OpResult]], workload: str) -> Iterator[WorkloadResult]:
    """The totals of ``auto`` and of every provider that was timed for all calls.

    Args:
        cases: the results of each different call; ``calls`` of a result is its weight.
        workload: name of the file.
    """
    by_provider = [
        {name: result for result in results for name in ("auto", result.provider) if name != "auto" or result.chosen}
        for results in cases
    ]
    common = [name for name in by_provider[0] if all(name in results for results in by_provider)] if cases else []
    lines = {name: [results[name] for results in by_provider] for name in common}
    ms = {name: _weighted([line.median_us for line in lines[name]], lines[name]) for name in common}
    for name in common:
        floors = [line.floor_us for line in lines[name] if line.floor_us is not None]
        floor = _weighted(floors, lines[name]) if len(floors) == len(cases) else None
        yield WorkloadResult(
            workload=workload,
            provider=name,
            calls=sum(line.calls or 0 for line in lines[name]),
            different=len(cases),
            total_ms=ms[name],
            floor_ms=floor,
            share_of_floor=None if floor is None else floor / ms[name],
            speedup_over_unfused=ms[UNFUSED] / ms[name],
            speedup_over_dense=ms[DENSE] / ms[name],
            conditions=lines[name][-1].conditions,
        )


def _weighted(us: Sequence[float], lines: Sequence[OpResult]) -> float:
    """Sum of the times of all calls, ms."""
    return sum(time * (line.calls or 0) for time, line in zip(us, lines, strict=True)) / 1e3
