"""Run tasks in processes of their own, each with a time limit, and keep every line of their results in a file.

A task that crashes, hangs or takes all memory costs its own results only. The file is JSON lines, each synchronised to
the disk when it is written; a later run of the same tasks continues where the file ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu.gpu_state import GpuState, summary

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("", "kernels", "packages/pytest-speedgate")  # to import from
LEAST_SECONDS = 5.0  # no task starts with less time left
START_LIMIT = 120.0  # seconds that a process has to import its modules
GRACE = 10.0  # seconds that a killed process has to end
SAMPLE_EVERY = 1.0  # seconds between two readings of the GPU's state
ATTEMPTS = 4  # of one task, each without the providers that failed in those before
STARTS = 2  # of one task that never ended, before it is given up: the whole check, or the machine, died with it
STRIKES = {"hang": 2, "crash": 1}  # a provider with two is left out of all later tasks
Line = dict[str, Any]
Emit = Callable[[Line], None]


@dataclass(frozen=True)
class Task:
    """One call of a function in a new process."""

    key: str  # names the task in the file; unique
    # ``"module:function"``, called as ``function(emit, without=..., **arguments)``. ``emit`` takes a line; ``without``
    # has the providers to leave out. A line ``{"kind": "step", "provider": ...}`` is not kept: it says who is to blame
    # if the process ends now.
    function: str
    arguments: Mapping[str, Any]  # JSON values
    limit_s: float  # seconds that the function has; then the process is killed


@dataclass(frozen=True)
class Fault:
    """The unexpected end of an attempt."""

    how: str  # a key of STRIKES, or "no time left"
    reason: str
    provider: str | None  # at work when it happened; None if it was none


@dataclass
class Journal:
    """The file of a run, and what it says about each task."""

    path: Path
    ended: set[str] = field(default_factory=set)
    begun: Counter[str] = field(default_factory=Counter)  # attempts of which the file does not say how they went
    strikes: Counter[str] = field(default_factory=Counter)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def open(cls, path: Path) -> Journal:
        """Read the file, if there is one. A last line that was not wholly written is removed."""
        journal = cls(path)
        if path.exists():
            content = path.read_bytes()
            if not content.endswith(b"\n"):
                os.truncate(path, content.rfind(b"\n") + 1)
        for line in read_lines(path):
            journal._note(line)
        return journal

    def write(self, **line: Any) -> None:
        """Append a line, and wait until the disk has it."""
        with self._lock:
            with self.path.open("a") as file:
                file.write(json.dumps(line) + "\n")
                file.flush()
                os.fsync(file.fileno())
            self._note(line)

    def excluded(self) -> list[str]:
        """Providers that crashed twice or hung."""
        return sorted(name for name, strikes in self.strikes.items() if strikes >= 2)

    def _note(self, line: Line) -> None:
        if line["kind"] == "start":
            self.begun[line["task"]] += 1
        elif line["kind"] == "state":
            self.begun[line["task"]] -= 1
        elif line["kind"] == "end":
            self.ended.add(line["task"])
        elif line["kind"] == "fault" and line["provider"] is not None:
            self.strikes[line["provider"]] += STRIKES[line["how"]]


def read_lines(path: Path) -> list[Line]:
    """The lines of a file without those of an attempt that was followed by another; none if there is no file."""
    lines: list[Line] = []
    if not path.exists():
        return lines
    for text in path.read_text().splitlines():
        line = json.loads(text)
        if line["kind"] == "start":
            kept = ("start", "state", "fault")
            lines = [old for old in lines if old.get("task") != line["task"] or old["kind"] in kept]
        lines.append(line)
    return lines


def run_tasks(
    tasks: Sequence[Task],
    journal: Journal,
    deadline: float,
    *,
    preload: Sequence[str] = (),
    state: Callable[[], GpuState | None] = lambda: None,
    show: Callable[[str], None] = lambda _: None,
) -> None:
    """Run the tasks that have not ended, in order, until ``deadline``.

    Args:
        tasks: most important first.
        journal: gets every line.
        deadline: of ``time.monotonic()``; a task that it interrupts starts again in the next run.
        preload: modules that the next task's process imports while a task runs.
        state: reads the GPU's clocks.
        show: gets one line of text per task.
    """
    standby: _Process | None = None
    todo = [task for task in tasks if task.key not in journal.ended]
    try:
        for index, task in enumerate(todo, start=1):
            if journal.begun[task.key] >= STARTS:
                reason = f"the check ended {STARTS} times while it ran"
                journal.write(kind="end", task=task.key, status="failed", reason=reason)
                continue
            excluded: list[str] = []
            for attempt in range(1, ATTEMPTS + 1):
                if deadline - time.monotonic() < LEAST_SECONDS:
                    return
                excluded = sorted({*excluded, *journal.excluded()})
                process = standby or _Process(preload)
                standby = _Process(preload) if index < len(todo) else None
                fault = _attempt(task, excluded, process, journal, deadline, state)
                if fault is not None and fault.how == "no time left":
                    return
                show(f"{task.key}: {'done' if fault is None else fault.reason}")
                if fault is None or fault.provider is None or fault.provider in excluded or attempt == ATTEMPTS:
                    break
                excluded.append(fault.provider)
            status = {"status": "done"} if fault is None else {"status": "failed", "reason": fault.reason}
            journal.write(kind="end", task=task.key, **status)
    finally:
        if standby is not None:
            standby.kill()


def _attempt(
    task: Task,
    without: Sequence[str],
    process: _Process,
    journal: Journal,
    deadline: float,
    state: Callable[[], GpuState | None],
) -> Fault | None:
    """Run a task once; its lines, the state of the GPU and a fault go to the journal."""
    journal.write(kind="start", task=task.key, without=list(without))
    start = time.monotonic()
    states: list[GpuState] = []
    provider: str | None = None
    last = ""  # kind of the last line
    try:
        process.begin(task, without)
        for line in process.lines(task.limit_s, deadline):
            if line is None:
                if (now := state()) is not None:
                    states.append(now)
                continue
            last = line["kind"]
            if last == "step":
                provider = line["provider"]
            elif last not in ("finished", "late"):
                journal.write(**line, task=task.key)
    finally:
        ended = process.kill()
    journal.write(kind="state", task=task.key, seconds=round(time.monotonic() - start, 2), gpu=summary(states))
    if last == "finished":
        return None
    if last != "late":
        fault = process.crash(provider)
    elif time.monotonic() >= deadline:
        return Fault("no time left", "no time left", None)
    else:
        fault = Fault("hang", f"not done after {task.limit_s:.0f} s", provider)
    if not ended:
        fault = Fault(fault.how, f"{fault.reason}; its process could not be killed", provider)
    journal.write(kind="fault", task=task.key, how=fault.how, provider=provider, reason=fault.reason)
    return fault


class _Process:
    """A process that waits for a task, with the modules of all tasks imported."""

    def __init__(self, preload: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 -- closed by kill
        # Pipes of one direction hold a thousand short lines, so that a task need not wait until they are read.
        orders, self._orders = Pipe(duplex=False)
        self._results, results = Pipe(duplex=False)
        with orders, results:
            ends = [orders.fileno(), results.fileno()]
            self._process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.gpu.check_runner", *map(str, ends), *preload],
                cwd=ROOT,
                env=os.environ | {"PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in FOLDERS)},
                pass_fds=ends,
                stdin=subprocess.DEVNULL,
                stdout=self._errors,  # what libraries print is not a result
                stderr=self._errors,
                start_new_session=True,  # its children, such as compilers, are killed with it
            )
        self._last = ""

    def begin(self, task: Task, without: Sequence[str]) -> None:
        """Hand the task over. A process that died while it waited is found out by ``lines``."""
        order = {"function": task.function, "arguments": {**task.arguments, "without": list(without)}}
        with contextlib.suppress(ConnectionError):
            self._orders.send_bytes(json.dumps(order).encode())

    def lines(self, limit_s: float, deadline: float) -> Iterator[Line | None]:
        """Lines until the process ends, or the line "late"; ``None`` once in ``SAMPLE_EVERY`` seconds."""
        sampled = time.monotonic()
        end = min(sampled + START_LIMIT, deadline)
        while (now := time.monotonic()) < end:
            if self._results.poll(max(0.0, min(sampled + SAMPLE_EVERY, end) - now)):
                try:
                    line = json.loads(self._results.recv_bytes())
                except (EOFError, OSError):  # it died
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        self._process.wait(GRACE)
                    return
                if line["kind"] == "ready":
                    end = min(time.monotonic() + limit_s, deadline)
                    continue
                yield line
                if line["kind"] == "finished":
                    return
            if time.monotonic() >= sampled + SAMPLE_EVERY:
                yield None
                sampled = time.monotonic()
        yield {"kind": "late"}

    def kill(self) -> bool:
        """Kill the process and its children; whether it ended."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        try:
            self._process.wait(GRACE)
        except subprocess.TimeoutExpired:  # a kernel that the driver cannot stop
            return False
        finally:
            self._errors.seek(0)
            text = self._errors.read().decode(errors="replace").strip()
            self._last = next((line for line in reversed(text.splitlines()) if _names_an_error(line)), text[-300:])
            self._errors.close()
            self._orders.close()
            self._results.close()
        return True

    def crash(self, provider: str | None) -> Fault:
        """What the ended process died of."""
        code = self._process.returncode
        died = f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"
        return Fault("crash", f"{self._last} ({died})" if self._last else died, provider)


def _names_an_error(line: str) -> bool:
    """Whether a line of standard error looks like the end of a traceback, ``module.Error: message``."""
    name, colon, _ = line.partition(":")
    return bool(colon) and name.rpartition(".")[2].isidentifier() and name.endswith(("Error", "Exception", "Resources"))


def _work(orders: Connection, results: Connection, preload: Sequence[str]) -> None:
    """The other process: wait for a task, run it, write its lines."""
    with contextlib.suppress(AttributeError):  # on Linux, end when the check ends
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError):  # if memory runs out, the system kills this process and not the check
        Path("/proc/self/oom_score_adj").write_text("1000")
    for module in preload:
        importlib.import_module(module)
    order = json.loads(orders.recv_bytes())
    module, _, name = order["function"].partition(":")

    def emit(line: Line) -> None:
        results.send_bytes(json.dumps(line).encode())

    function = getattr(importlib.import_module(module), name)
    emit({"kind": "ready"})
    function(emit, **order["arguments"])
    emit({"kind": "finished"})


if __name__ == "__main__":
    _work(Connection(int(sys.argv[1]), writable=False), Connection(int(sys.argv[2]), readable=False), sys.argv[3:])
