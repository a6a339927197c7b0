"""Engines of SGLang in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from tests.command_line import ROOT, environment

MISSING = "SGLang is not installed; `make test-sglang` makes an environment that has it"
WITHOUT_KERNELS = Path(__file__).parent / "without_kernels"
VARIABLES = {"SGLANG_USE_CPU_ENGINE": "1"}  # before the first import of SGLang
TIMEOUT = 1200  # seconds; the machine may be busy


def sglang_environment() -> dict[str, str]:
    """For processes with SGLang: its CPU engine, without the kernels that no package brings."""
    variables = environment()
    path = os.pathsep.join([str(WITHOUT_KERNELS), variables["PYTHONPATH"]])
    return {**variables, **VARIABLES, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}


def run_engine(
    folder: Path, scratch: Path, processes: int = 1, variables: Mapping[str, str] | None = None
) -> tuple[list[list[int]] | None, str]:
    """Greedy tokens for each of ``tests.vllm.engines.PROMPTS``, ``None`` if the engine failed, and what it printed."""
    output = scratch / "tokens.json"
    output.unlink(missing_ok=True)
    cores = sorted(os.sched_getaffinity(0))[:processes]
    bound = {"SGLANG_CPU_OMP_THREADS_BIND": "|".join(map(str, cores))} if processes > 1 else {}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sglang.generate", str(folder), str(processes), str(output)],
        cwd=ROOT,
        env={**sglang_environment(), **bound, **(variables or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT,
    )
    return (json.loads(output.read_text()) if output.exists() else None), done.stdout
