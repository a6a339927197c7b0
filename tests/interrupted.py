"""Compressions of tiny models that are stopped somewhere."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.run_state import NoState, RunState
from grasp.compress import compress_
from grasp.compression.span_plan import SpanMemory
from grasp.config import GraspConfig
from grasp.files import tensors_digest
from grasp.method.cost_table import CostTable
from grasp.model.targets import decoder
from grasp.statistics.hidden_states import Scratch
from grasp.statistics.processes import Processes
from grasp.statistics.sharding import shard_
from tests.tiny_models import tiny_batches, tiny_model

CONFIG = GraspConfig(layers=(0, 2), retain_ratio=0.4)
BATCHES = 3
REPORTED = ("modules", "block_influence", "redundant_layers", "removed_layers", "scope", "held_out_loss")
REPORTED += ("retain_ratio", "calibration", "before", "after")
Run = tuple[CompressionReport, dict[str, Tensor]]


class Killed(BaseException):
    """Stands for kill -9 where no process is to be started."""


def run(
    folder: Path | None,
    config: GraspConfig = CONFIG,
    *,
    family: str = "llama",
    dtype: torch.dtype = torch.float32,
    notify: Callable[[str], None] = lambda text: None,
    progress: Callable[[str, int, int], None] = lambda step, done, total: None,
    costs: CostTable | None = None,
    held_out: Sequence[Tensor] = (),
    **model: Any,
) -> Run:
    """Compress a tiny model, keeping the run in ``folder``; its report and weights."""
    compressed, batches = tiny_model(family, dtype, **model), tiny_batches(BATCHES)
    with NoState() if folder is None else RunState(folder, notify=notify) as state:
        report = compress_(compressed, batches, config, costs=costs, held_out=held_out, progress=progress, state=state)
        return report, compressed.state_dict()


def take_little_memory(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Plan all runs as within the least budget: each part of each layer is swept alone, hidden states are in files."""
    plan = SpanMemory.plan
    set_attribute(SpanMemory, "plan", lambda memory, budget: plan(memory, memory.least()))
    set_attribute(Scratch, "takes", lambda scratch, size: False)


def stop_at(step: str, count: int) -> Callable[[str, int, int], None]:
    """End the run when it reports that ``count`` units of ``step`` are done."""

    def progress(now: str, done: int, total: int) -> None:
        if (now, done) == (step, count):
            raise Killed

    return progress


def stopped(folder: Path, step: str, count: int, config: GraspConfig = CONFIG, **options: Any) -> None:
    with pytest.raises(Killed):
        run(folder, config, progress=stop_at(step, count), **options)
    assert (folder / "state.json").exists()


def stored(folder: Path, stem: str) -> Path:
    """The file of a run folder whose name is ``stem``, a digest and a suffix."""
    (path,) = folder.glob(f"{stem}.????????????????????????????????.safetensors")
    return path


def assert_same(got: Run, expected: Run) -> None:
    for name in REPORTED:
        assert getattr(got[0], name) == getattr(expected[0], name)
    assert got[1].keys() == expected[1].keys()
    for name, tensor in got[1].items():
        assert torch.equal(tensor, expected[1][name]), name


def stopped_at_every_write(
    config: GraspConfig, family: str, folder: Path, expected: Run, monkeypatch: pytest.MonkeyPatch, *, step: int
) -> int:
    """Stop a run at its first write, then ``step`` writes later, and so on, each to be continued; how many it has."""
    replace, left, stop = os.replace, [0], 1

    def counted(source: Any, target: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", counted)
        while True:
            left[0] = stop
            try:
                assert_same(run(folder, config, family=family), expected)
                return stop - left[0]
            except Killed:
                left[0] = 0
            assert_same(run(folder, config, family=family), expected)
            assert not folder.exists()
            stop += step


def shared_model(processes: Processes, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The tiny model of one of several processes, sharded if they shard it."""
    model = tiny_model("llama", dtype)
    if processes.sharded:
        shard_(model, torch.device("cpu"), processes)
    return model


def compress_with_a_bad_sweep(processes: Processes) -> None:
    """In the second process the last layer returns NaN, though not while block influence is measured."""
    model, runs = shared_model(processes), list[int]()

    def spoil(_: Any, args: Any, output: Tensor) -> Tensor:
        runs.append(1)
        return output * float("nan") if len(runs) > 4 and processes.rank == 1 else output

    decoder(model).layers[-1].register_forward_hook(spoil)
    compress_(model, tiny_batches(BATCHES), CONFIG, processes=processes)


def compress_until_killed(
    processes: Processes, folder: Path, config: GraspConfig, kind: str, count: int | None
) -> list[Any]:
    """The second process is killed in sweep ``count`` of a kind, if given. Sweeps, indices, digest of the weights."""
    model, sweeps = shared_model(processes, torch.float64), list[str]()

    def progress(step: str, done: int, total: int) -> None:
        if step.startswith(kind) and done == 1:
            sweeps.append(step)
        if len(sweeps) == count and processes.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    with RunState(folder, rank=processes.rank, processes=processes.size) as state:
        batches = tiny_batches(BATCHES)
        report = compress_(model, batches, config, progress=progress, state=state, processes=processes)
    digest = "" if processes.sharded else tensors_digest(model.state_dict().items())
    return [sweeps, [module.indices for module in report.modules], digest]
