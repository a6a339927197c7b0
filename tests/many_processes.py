"""Run a function in several processes that are connected by gloo."""

from __future__ import annotations

import os
import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

import torch

from grasp.statistics.processes import Processes, joined
from tests.command_line import environment, torchrun_variables
from tests.forked import CONTEXT, start_server

_PATIENCE = 120.0  # seconds until a process counts as one that hangs


Child = tuple[ForkServerProcess, Connection]


@dataclass
class Outcome:
    """How a process ended: what the function returned or raised; neither where the process was killed."""

    value: Any = None
    error: Exception | None = None
    exit_code: int | None = None


def run(work: Callable[..., Any], *arguments: Any, size: int = 2, sharded: bool = False) -> list[Outcome]:
    """Call ``work(processes, *arguments)`` in ``size`` processes of one thread; ``work`` is a module's function.

    Returns:
        What became of each, in order.

    Raises:
        TimeoutError: if one is still running after two minutes; all are then ended.
    """
    return outcomes(start(work, *arguments, size=size, sharded=sharded))


def start(work: Callable[..., Any], *arguments: Any, size: int, sharded: bool = False) -> list[Child]:
    """As ``run``, but return the processes while they run."""
    start_server(environment())
    children = []
    for variables in torchrun_variables(size):
        mine, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(target=_child, args=(theirs, variables, sharded, work, arguments))
        process.start()
        theirs.close()
        children.append((process, mine))
    return children


def outcomes(children: list[Child]) -> list[Outcome]:
    """Wait for processes, as ``run`` does."""
    deadline = time.monotonic() + _PATIENCE
    ends = [_outcome(pipe, deadline) for _, pipe in children]
    for outcome, (process, _) in zip(ends, children, strict=True):
        process.join(max(0.0, deadline - time.monotonic()))
        outcome.exit_code = process.exitcode
    hanging = [rank for rank, (process, _) in enumerate(children) if process.is_alive()]
    for process, _ in children:
        process.kill()
        process.join()
    if hanging:
        raise TimeoutError(f"processes {hanging} of {len(children)} hang")
    return ends


def _outcome(pipe: Connection, deadline: float) -> Outcome:
    if not pipe.poll(max(0.0, deadline - time.monotonic())):
        return Outcome()
    try:
        outcome: Outcome = pickle.loads(pipe.recv_bytes())
    except EOFError:
        return Outcome()
    return outcome


def _child(
    pipe: Connection, variables: dict[str, str], sharded: bool, work: Callable[..., Any], arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ |= variables
    try:
        with joined(torch.device("cpu"), sharded=sharded) as processes:
            assert processes == Processes(int(variables["RANK"]), int(variables["WORLD_SIZE"]), sharded)
            outcome = Outcome(work(processes, *arguments))
    except Exception as error:  # noqa: BLE001  # whatever it is, the test looks at it
        outcome = Outcome(error=error)
    pipe.send_bytes(pickle.dumps(outcome))  # a tensor sent as it is would need this process until it is read
