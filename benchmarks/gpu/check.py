"""Check all kernels on a GPU in one run of minutes: tests, launch costs, times, targets.

``python -m benchmarks.gpu.check`` writes JSON lines. Tasks run in order of importance, each in its own process with a
time limit, so that a kernel that crashes or hangs costs only itself. When time is up, the same command continues.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.gpu.check_cases import GpuCase
from benchmarks.gpu.check_report import print_report, read_report
from benchmarks.gpu.check_runner import ROOT, Journal, Task, read_lines, run_tasks
from benchmarks.gpu.gpu_state import read_state
from grasp.bench.conditions import commit, device_name
from grasp.bench.workloads import ATTENTION, DOWN, GATE_UP, GROUPED_QUERY, GROUPED_QUERY_QKV, MLP, QKV, WIDE_MLP

TASKS, MODELS = "benchmarks.gpu.check_tasks", "benchmarks.gpu.check_model"
PRELOAD = (TASKS,)
ROWS = (1, 16, 64, 4, 256, 2048, 8192)  # in order of importance
LINEARS = (ATTENTION, MLP, GROUPED_QUERY, WIDE_MLP)
LAYER = (
    ("lowrank_linear_grouped", QKV),
    ("lowrank_linear", ATTENTION),
    ("lowrank_linear_grouped", GATE_UP),
    ("lowrank_linear", DOWN),
)
HIGH_RANK = "4096x4096r1638"  # 80 % of the dense parameters; 64 % in pivoted form
GRADIENTS = (ATTENTION, "4096x4096r512", "4096x4096r4096")
GRADIENT_ROWS = (2048, 8192, 512)
FEW_ROWS = (1, 16, 64)
BARRIER_ROWS = (1, 16)
TESTS_SHARE = 0.4  # of the time: tests that are not done then go on after everything else
GPU_TESTS = re.compile(r"mark\.gpu\b|\bDEVICES\)")  # the parameter "cuda" of DEVICES has the mark
MODEL = {  # Llama-2-7B with a quarter of its layers
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "num_hidden_layers": 8,
    "vocab_size": 32000,
}
RETAIN_RATIO = 0.1


@dataclass(frozen=True)
class CheckPlan:
    """The tasks of a run in their order."""

    first: Sequence[Task]  # the most important times
    tests: Sequence[Task]
    rest: Sequence[Task]

    def tasks(self) -> list[Task]:
        """All of them."""
        return [*self.first, *self.tests, *self.rest]


CARD = Task("card", f"{TASKS}:card", {}, 60)


def full_plan(card: Mapping[str, Any] | None) -> CheckPlan:
    """The tasks of the project's targets; ``card`` has the measured speeds.

    Kernels with a barrier across the grid, which could hang, come last; only the slow tuning of ``torch.compile`` is
    less important.
    """

    def timed(case: GpuCase, kind: str = "graph", limit_s: float = 60) -> Task:
        arguments = {"case": asdict(case), "card": card, "kind": kind}
        return Task(f"{kind}: {case.name} {case.label}, {case.rows} rows", f"{TASKS}:measure", arguments, limit_s)

    first = [timed(case) for rows in FEW_ROWS for case in (layer(rows), single("lowrank_linear", ATTENTION, rows))]
    rest: list[Task] = [Task("launches", f"{TASKS}:launches", {}, 60)]
    for rows in ROWS:
        eager = [layer(rows), single("lowrank_linear", ATTENTION, rows), single("lowrank_linear_grouped", QKV, rows)]
        cases = [layer(rows), *(single("lowrank_linear", text, rows) for text in LINEARS)]
        cases += [single("lowrank_linear_grouped", GROUPED_QUERY_QKV, rows), single("lowrank_glu", GATE_UP, rows)]
        high = replace(single("lowrank_linear", HIGH_RANK, rows), name="lowrank_linear, high rank")
        cases += [high, pivoted(high), pivoted(single("lowrank_glu", GATE_UP, rows)), pivoted(layer(rows))]
        rest += map(timed, cases)
        if rows <= FEW_ROWS[1]:
            rest += [timed(quantized(case, kind)) for case in (high, pivoted(high)) for kind in ("int8", "int4/64")]
        if rows in FEW_ROWS:
            rest += [timed(case, "eager") for case in eager if rows <= BARRIER_ROWS[-1]]
            rest.append(timed(unpacked(layer(rows))))
        if rows == FEW_ROWS[-1]:
            low_rank = {"config": MODEL, "retain_ratio": RETAIN_RATIO}
            rest.append(Task("model", f"{MODELS}:eager", low_rank, 90))
            rest.append(Task("model, static cache", f"{MODELS}:static_cache", low_rank, 120))
            rest += [timed(single("singular_value_grad", text, T)) for T in GRADIENT_ROWS for text in GRADIENTS]
    rest += [
        Task("barrier", f"{TASKS}:barrier", {}, 30),
        *(timed(single("lowrank_linear", ATTENTION, rows), "barrier", 30) for rows in BARRIER_ROWS),
        Task("dense model, static cache", f"{MODELS}:static_cache", {"config": MODEL, "retain_ratio": None}, 120),
        *(timed(single("lowrank_linear", ATTENTION, rows), "compiled", 150) for rows in FEW_ROWS),
        *(timed(layer(rows), "compiled", 300) for rows in FEW_ROWS),
    ]
    done = {task.key for task in first}
    tests = [
        Task(f"tests: {name}", f"{TASKS}:pytest_file", {"arguments": ["-m", "gpu", name]}, 180) for name in gpu_tests()
    ]
    return CheckPlan(first, tests, [task for task in rest if task.key not in done])


def gpu_tests() -> list[str]:
    """The files with tests that ``-m gpu`` selects on a machine with a GPU."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(ROOT)) for file in files if GPU_TESTS.search(file.read_text())]


def single(op: str, text: str, rows: int) -> GpuCase:
    """One call of an op."""
    return GpuCase(op, ((op, text),), rows)


def layer(rows: int) -> GpuCase:
    """The seven linears of a layer of Llama-2-7B in four calls."""
    return GpuCase("layer", LAYER, rows)


def unpacked(case: GpuCase) -> GpuCase:
    """The same case with unpadded factors in memory of their own, as a direct call of an op may bring them."""
    return replace(case, name=f"{case.name}, unpacked", packed=False)


def pivoted(case: GpuCase) -> GpuCase:
    """The same case with pivoted factors of the same ranks."""
    return replace(case, name=f"{case.name}, pivoted", pivoted=True)


def quantized(case: GpuCase, storage: str) -> GpuCase:
    """The same case with quantised factors, as a model has them: the ranks as they are."""
    return replace(case, name=f"{case.name}, {storage}", packed=False, storage=storage)


def check(path: Path, seconds: float, console: Console, *, tests: bool = True) -> None:
    """Run the plan for at most ``seconds``, or continue it."""
    start = time.monotonic()
    journal = Journal.open(path)

    def show(text: str) -> None:
        console.print(f"{time.monotonic() - start:5.0f} s  {text}", highlight=False, markup=False)

    def run(tasks: Sequence[Task], until: float) -> None:
        run_tasks(tasks, journal, start + until, preload=PRELOAD, state=read_state, show=show)

    run([CARD], seconds)
    plan = full_plan(next((line["card"] for line in read_lines(path) if line["kind"] == "card"), None))
    run(plan.first, seconds)
    if tests:  # beside each other: nothing is timed meanwhile
        with ThreadPoolExecutor(len(plan.tests)) as pool:
            list(pool.map(lambda task: run([task], TESTS_SHARE * seconds), plan.tests))
    run(plan.rest, seconds)
    if tests:
        run(plan.tests, seconds)
    for task in plan.tasks():
        if task.key not in journal.ended and (tests or task not in plan.tests):
            show(f"no time left: {task.key}")


def require_same(path: Path, stamp: Mapping[str, str | None]) -> None:
    """Raise unless the file was begun with this stamp, or is new; a new one begins with it.

    Raises:
        typer.BadParameter: if the GPU or the commit is another.
    """
    journal = Journal.open(path)  # it removes a last line that was not wholly written
    lines = read_lines(path)
    if not lines:
        journal.write(kind="run", **stamp)
        return
    before = {name: lines[0].get(name) for name in stamp}
    if before != dict(stamp):
        raise typer.BadParameter(f"{path} was begun with {before}, this is {dict(stamp)}; choose another file")


def main(
    output: Annotated[Path, typer.Option("--output", "-o", help="The file of JSON lines.")] = Path("gpu-check.jsonl"),
    seconds: Annotated[float, typer.Option(min=1, help="Nothing runs longer; run again to continue.")] = 520,
    tests: Annotated[bool, typer.Option(help="Run the tests that need a GPU.")] = True,
) -> None:
    """Test and time all kernels on this machine's GPU."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("found no CUDA GPU; run the check on a machine with one")
    require_same(output, {"gpu": device_name(torch.device("cuda", 0)), "commit": commit()})
    console = Console(width=160)
    check(output, seconds, console, tests=tests)
    report = read_report(read_lines(output))
    print_report(report, console)
    raise typer.Exit(0 if report.sound() else 1)


if __name__ == "__main__":
    typer.run(main)
