"""The tasks of ``benchmarks.gpu.check``, each run in a process of its own: they test and time, and emit lines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
import torch
from triton import OutOfResources

from benchmarks.gpu.check_cases import (
    DENSE,
    PROVIDERS,
    UNFUSED,
    CaseProvider,
    GpuCase,
    Operands,
    complaint,
    make_operands,
)
from benchmarks.gpu.check_report import LeftOut, ProviderTime
from benchmarks.gpu.check_runner import Emit
from benchmarks.gpu.launch_costs import measure_barrier, measure_launches
from grasp.bench.conditions import ROOT, conditions, measure_card, warm_up
from grasp.bench.timing import Sample, turns
from grasp.evaluation.generation import now
from grasp_kernels import launch_configs, roofline
from grasp_kernels.roofline import Card
from grasp_kernels.triton.launch import gpu_of
from speedgate.timing import Batch, Rotation, batch

NO_ROOM = "the GPU has too little shared memory for its configuration"
NO_MEMORY = "the GPU has too little memory"
RAMP = 0.5  # seconds of matrix products before anything is timed: an idle GPU raises its clocks in steps
EAGER_CALLS = 50


def card(emit: Emit, *, without: Sequence[str] = ()) -> None:
    """Speeds, versions, and the configurations that are used."""
    device = the_device()
    measured, gpu = measure_card(device, torch.bfloat16), gpu_of(device)
    configurations = {kernel: launch_configs.status(kernel, gpu) for kernel in sorted(launch_configs.SOURCES)}
    beside = {"conditions": asdict(conditions(measured, device)), "configurations": configurations}
    emit({"kind": "card", "card": asdict(measured), **beside})


def launches(emit: Emit, *, calls: int = 200, repetitions: int = 20, without: Sequence[str] = ()) -> None:
    """Costs of launches, without a barrier."""
    warm_up(the_device(), RAMP)
    emit({"kind": "launches", **asdict(measure_launches(the_device(), calls=calls, repetitions=repetitions))})


def barrier(emit: Emit, *, calls: int = 200, repetitions: int = 20, without: Sequence[str] = ()) -> None:
    """The cost of a barrier across the grid."""
    warm_up(the_device(), RAMP)
    emit({"kind": "barrier", "barrier_us": measure_barrier(the_device(), calls=calls, repetitions=repetitions)})


class EagerBatch:
    """Calls from Python one after the other, as a program without CUDA graphs makes them, timed by the host."""

    def __init__(self, calls: Any, rotation: Rotation[Any]) -> None:
        self._function, self._operands = calls, rotation.take(1)[0]
        self._device = self._operands[0].x.device
        self.calls = EAGER_CALLS
        self.host: list[float] = []
        self.seconds()
        self.host.clear()

    def seconds(self) -> float:
        """Make the calls and wait; the seconds of one call. ``host`` gets the part before the wait."""
        start = now(self._device)
        for _ in range(self.calls):
            self._function(self._operands)
        self.host.append((time.perf_counter() - start) / self.calls)
        return (now(self._device) - start) / self.calls


@torch.inference_mode()
def measure(
    emit: Emit,
    *,
    case: Mapping[str, Any],
    card: Mapping[str, Any] | None,
    kind: str = "graph",
    rotate_bytes: int = 256 << 20,
    repetitions: int = 20,
    without: Sequence[str] = (),
) -> None:
    """Check and time the providers of a case; a wrong one is not timed.

    Args:
        emit: gets a line per provider.
        case: of a ``GpuCase``.
        card: measured speeds, for the floor.
        kind: a key of ``PROVIDERS``.
        rotate_bytes: more than any cache holds.
        repetitions: turns of each provider.
        without: providers to leave out.
    """
    device, this = the_device(), GpuCase(**case)
    if kind != "graph":  # the targets are for graphs
        this = replace(this, name=f"{this.name}, {kind}")
    warm_up(device, RAMP)
    operands = make_operands(this, device, 0 if kind == "eager" else rotate_bytes)
    batches: dict[str, Batch] = {}
    able, reasons = PROVIDERS[kind](this, device)
    for name, reason in reasons.items():
        emit({"kind": "left_out", **asdict(LeftOut(this.name, this.rows, name, reason))})
    for name, provider in able.items():
        if name not in without:
            emit({"kind": "step", "provider": name})
            prepared = _prepare(this, provider, operands, device, kind)
            if isinstance(prepared, str):
                wrong = not prepared.startswith((NO_ROOM, NO_MEMORY))
                emit({"kind": "left_out", **asdict(LeftOut(this.name, this.rows, name, prepared, wrong))})
            else:
                batches[name] = prepared
    if batches:
        _time(emit, this, batches, None if card is None else Card(**card), repetitions)


def _prepare(case: GpuCase, provider: CaseProvider, operands: Operands, device: torch.device, kind: str) -> Batch | str:
    """A batch to be timed, or the reason why it is not."""
    try:
        if provider not in (UNFUSED, DENSE) and (error := complaint(case, provider, operands)) is not None:
            return error
        calls, rotation = provider.calls(case), operands.rotation(provider.reads)
        return EagerBatch(calls, rotation) if kind == "eager" else batch(device.type, calls, rotation)
    except OutOfResources as shortage:
        return f"{NO_ROOM}: {shortage}"
    except torch.OutOfMemoryError as shortage:
        return f"{NO_MEMORY}: {shortage}"


def _time(emit: Emit, case: GpuCase, batches: Mapping[str, Batch], card: Card | None, repetitions: int) -> None:
    times: dict[str, list[float]] = {name: [] for name in batches}
    for _, name in turns(list(batches), repetitions):
        emit({"kind": "step", "provider": name})
        times[name].append(batches[name].seconds())
    samples = {name: Sample(tuple(seconds)) for name, seconds in times.items()}
    flops = sum(cost.flops for cost in case.costs())
    for name, sample in samples.items():
        speedups = {
            f"speedup_over_{other}": sample.speedup_over(samples[other]) if other in samples else None
            for other in ("unfused", "stacked", "dense")
        }
        costs = case.dense_costs() if name == "dense" and case.calls[0][0] != "singular_value_grad" else case.costs()
        line = ProviderTime(
            case=case.name,
            shapes=case.label,
            rows=case.rows,
            dtype=case.dtype_name,
            provider=name,
            median_us=sample.median * 1e6,
            spread=sample.spread,
            floor_us=None if card is None else roofline.floor(card, *costs) * 1e6,
            flops_share=None if card is None else flops / sample.median / card.flops,
            calls=batches[name].calls,
            host_us=Sample(tuple(timed.host)).median * 1e6 if isinstance(timed := batches[name], EagerBatch) else None,
            **speedups,
        )
        emit({"kind": "time", **asdict(line)})


def pytest_file(emit: Emit, *, arguments: Sequence[str], without: Sequence[str] = ()) -> None:
    """Run pytest in this process; each test is a step, and ``without`` has tests to leave out."""
    observer = _Observer(emit)
    options = ["-q", "--tb=line", "-p", "no:cacheprovider", "--rootdir", str(ROOT), *arguments]
    code = pytest.main([*options, *(f"--deselect={name}" for name in without)], plugins=[observer])
    if observer.poison is not None:
        raise RuntimeError(observer.poison)
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED, pytest.ExitCode.NO_TESTS_COLLECTED):
        raise RuntimeError(f"pytest ended with {pytest.ExitCode(code)!r}")
    emit({"kind": "tests", "arguments": list(arguments), **observer.counts})


class _Observer:
    """Emits each test as it begins and each failure, and ends the run if the process cannot use the GPU any more."""

    def __init__(self, emit: Emit) -> None:
        self._emit = emit
        self.counts = {"passed_tests": 0, "failed_tests": 0, "skipped_tests": 0}
        self.poison: str | None = None

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._emit({"kind": "step", "provider": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            self.counts[f"{report.outcome}_tests"] += 1
        if report.failed:
            reason = str(report.longrepr).strip().splitlines()[-1][-300:]
            self._emit({"kind": "failed_test", "test": report.nodeid, "reason": reason})
            if torch.cuda.is_initialized():
                try:
                    torch.cuda.synchronize()
                except RuntimeError as error:  # a CUDA error stays: all later tests would fail
                    self.poison = str(error)
                    pytest.exit(self.poison)


def the_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
