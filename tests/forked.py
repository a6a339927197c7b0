"""Python processes that begin with the libraries imported, because they are forked from a server that has done so."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from unittest import mock

from grasp.cli.root import QUIET

CONTEXT = multiprocessing.get_context("forkserver")
_PRELOAD = [
    "grasp.cli",
    "grasp.compress",
    "grasp.statistics.sharding",
    "grasp.workflows.compress",
    "grasp.workflows.evaluate",
    "tests.many_processes",
    "transformers.models.auto.modeling_auto",
    "transformers.models.auto.tokenization_auto",
    "transformers.models.llama.modeling_llama",
    "tests.traced",
]


def start_server(environment: Mapping[str, str]) -> None:
    """Start the server, unless it runs, with the variables that libraries read when they are imported."""
    CONTEXT.set_forkserver_preload(_PRELOAD)
    with mock.patch.dict(os.environ, {**environment, **QUIET}, clear=True):
        forkserver.ensure_running()


def python(
    code: str, arguments: Sequence[str] = (), *, cwd: Path, environment: Mapping[str, str], timeout: float = 600
) -> subprocess.CompletedProcess[str]:
    """As ``python -c code arguments`` in a folder, in less time.

    Raises:
        subprocess.TimeoutExpired: if the process takes longer than ``timeout`` seconds; it is then ended.
    """
    [run] = pythons(code, arguments, cwd=cwd, environments=[environment], timeout=timeout)
    return run


def pythons(
    code: str, arguments: Sequence[str], *, cwd: Path, environments: Sequence[Mapping[str, str]], timeout: float = 600
) -> list[subprocess.CompletedProcess[str]]:
    """As ``python``, in several processes at the same time, one for each environment."""
    with TemporaryDirectory() as folder:
        started = [
            start(code, arguments, cwd=cwd, environment=environment, streams=Path(folder) / str(rank))
            for rank, environment in enumerate(environments)
        ]
        processes = [process for process, *_ in started]
        end = time.monotonic() + timeout
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        if any(process.exitcode is None for process in processes):
            for process in processes:
                process.kill()
                process.join()
            raise subprocess.TimeoutExpired(code, timeout)
        return [
            subprocess.CompletedProcess(
                ["-c", code, *arguments], process.exitcode or 0, out.read_text(), err.read_text()
            )
            for process, out, err in started
        ]


def start(
    code: str, arguments: Sequence[str], *, cwd: Path, environment: Mapping[str, str], streams: Path
) -> tuple[ForkServerProcess, Path, Path]:
    """A process as of ``python`` while it runs, and the files of its output and errors, in the folder ``streams``."""
    start_server(environment)
    streams.mkdir(exist_ok=True)
    out, err = streams / "out.txt", streams / "err.txt"
    process = CONTEXT.Process(target=_run, args=(code, list(arguments), cwd, dict(environment), out, err))
    process.start()
    return process, out, err


def _run(code: str, arguments: list[str], cwd: Path, environment: dict[str, str], out: Path, err: Path) -> None:
    for stream, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), stream)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.argv = ["-c", *arguments]
    sys.path.insert(0, "")
    main = sys.modules["__main__"] = ModuleType("__main__")
    try:
        exec(compile(code, "<string>", "exec"), main.__dict__)
    finally:
        atexit._run_exitfuncs()  # which multiprocessing leaves out
