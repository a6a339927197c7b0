"""Test the gate on this machine: it must catch a kernel that takes 30 % longer, and pass unchanged kernels.

``python -m benchmarks.gate.selftest`` records a baseline. Then it runs the benchmarks in new processes, in turns
unchanged and with one op slowed down, and counts the runs in which the gate names exactly the slowed op. It uses the
CPU even if there is a GPU, because the planted slowdown keeps the host busy.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from grasp.bench.workloads import ATTENTION, SMALL_MLP
from grasp_kernels.dispatch import explain
from speedgate.plugin import UNUSABLE

ROOT = Path(__file__).resolve().parents[2]
# Rows, dtype and shape by op: small and large, fp32 and bf16.
SELECTION = {
    "lowrank_linear": (1, "bfloat16", ATTENTION),
    "lowrank_linear_grouped": (16, "float32", SMALL_MLP),
    "lowrank_glu": (1, "float32", SMALL_MLP),
    "singular_value_grad": (16, "float32", SMALL_MLP),
}


@dataclass(frozen=True)
class Trial:
    """One run of the benchmarks and the gate's verdict."""

    slow_op: str | None
    code: int
    regressions: Sequence[str]  # ops in the gate's lines
    output: str

    @property
    def right(self) -> bool:
        """Whether lines and exit code name the slowed op and no other."""
        expected = [] if self.slow_op is None else [self.slow_op]
        return self.code == len(expected) and list(self.regressions) == expected


def test_ids() -> list[str]:
    """Test ids of the selection, each op on the backend that a CPU would choose."""
    ids = []
    for op, (rows, dtype, shape) in SELECTION.items():
        backend = next(name for name, answer in explain(op, rows=rows, rank=1).items() if answer == "chosen")
        ids.append(f"benchmarks/gate/test_ops.py::test_backend[{shape}-{op}-{rows}-{dtype}-{backend}]")
    return ids


def run_benchmarks(mode: str, storage: Path, slow_op: str | None = None) -> Trial:
    """Run the selection in a new process."""
    slowdown = ["-p", "benchmarks.gate.slowdown", "--slow-op", slow_op] if slow_op else []
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *slowdown, *test_ids()]
    options = [f"--gate={mode}", "--gate-device=cpu", f"--benchmark-storage={storage}"]
    run = subprocess.run([*command, *options], cwd=ROOT, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.startswith("regression: ")]
    return Trial(slow_op, run.returncode, [line.split()[1] for line in lines], run.stdout + run.stderr)


def main(trials: Annotated[int, typer.Option(min=1, help="Of each kind.")] = 10) -> None:
    """Plant slowdowns; count how many the gate catches, and how many unchanged runs it passes."""
    ops, start = list(SELECTION), time.monotonic()
    results: list[Trial] = []
    with tempfile.TemporaryDirectory() as folder:
        baseline = run_benchmarks("save", Path(folder))
        if baseline.code:
            print(baseline.output)
            raise typer.Exit(UNUSABLE)
        for number in range(trials):
            for slow_op in (None, ops[number % len(ops)]):
                results.append(run_benchmarks("compare", Path(folder), slow_op))
                print(f"{number + 1}. {_describe(results[-1])}", flush=True)
    for name, kind in (
        ("caught", [t for t in results if t.slow_op]),
        ("passed", [t for t in results if not t.slow_op]),
    ):
        print(f"{name} {sum(trial.right for trial in kind)} of {len(kind)}")
    print(f"{time.monotonic() - start:.0f} s")
    raise typer.Exit(int(not all(trial.right for trial in results)))


def _describe(trial: Trial) -> str:
    what = f"{trial.slow_op} slowed down" if trial.slow_op else "unchanged"
    changes = [line for line in trial.output.splitlines() if line.startswith(("regression: ", "unclear: ", "better: "))]
    text = "\n   ".join([f"{what}: {'right' if trial.right else f'WRONG, exit code {trial.code}'}", *changes])
    return text if trial.right or trial.code in (0, 1) else f"{text}\n{trial.output}"


if __name__ == "__main__":
    typer.run(main)
