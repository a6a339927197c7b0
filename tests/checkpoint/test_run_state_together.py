"""Runs that decide on all linears together, stopped and continued."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from grasp.bench import costs as bench_costs
from grasp.checkpoint import run_folder
from grasp.checkpoint.run_state import NoState, RunState
from grasp.compression import narrow
from grasp.config import GraspConfig
from grasp.errors import CheckpointError, ResumeError
from grasp.method import channels
from grasp.method.cost_table import CostTable, LinearSeconds
from grasp.progress import Progress, no_progress
from grasp.workflows.compress import compress
from grasp.workflows.samples import Samples
from tests.command_line import save_tiny_model
from tests.interrupted import (
    BATCHES,
    Killed,
    Run,
    assert_same,
    run,
    stop_at,
    stopped,
    stopped_at_every_write,
    take_little_memory,
)
from tests.tiny_models import tiny_batches

pytestmark = pytest.mark.long

BEST = GraspConfig.best(compression_ratio=0.1)
KFAC: dict[str, Any] = {"basis": "kfac", "metric": "magnitude", "allocation": "global", "schedule": "single-sweep"}
SWEEP = "covariances, 3 layers"
LAYERS = 3  # of a tiny model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


def replaced(found: Run) -> int:
    """How many linears are low-rank."""
    return sum(not module.reason for module in found[0].modules)


def costs(call: float = 0.0) -> CostTable:
    """A table of the tiny Llama in which a linear costs its weights, and each of a low-rank one's two a call."""
    shapes = [(32, 32), (16, 32), (48, 32), (32, 48)]
    linears = {((n, k), None): LinearSeconds(n * k, (1, 64), (n + k + call, 64 * (n + k) + call)) for n, k in shapes}
    return CostTable("any", "measured", "float32", linears, 0.0, 100.0, form="pivoted")


@pytest.mark.parametrize(
    ("family", "options", "sums", "little_memory", "narrowed"),
    [
        ("gpt2", {**KFAC, "refit": True}, 0, False, 0),
        ("llama", {"allocation": "global", "metric": "taylor", "schedule": "single-sweep"}, BATCHES, False, 0),
        ("llama", {**KFAC, "schedule": "progressive", "refit": True}, 0, True, 0),
        ("llama", {**KFAC, "schedule": "progressive", "refit": True, "scope": "model"}, 0, False, 2),
    ],
)
def test_a_run_stopped_at_any_write_ends_as_if_it_had_not_been(
    family: str,
    options: dict[str, Any],
    sums: int,
    little_memory: bool,
    narrowed: int,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    fuzzing: bool,
) -> None:
    monkeypatch.setattr(run_folder, "INTERVAL", 0.0)
    monkeypatch.setattr(run_folder, "WRITE_FRACTION", float("inf"))
    config = GraspConfig(num_layers=1, retain_ratio=0.4, **options)
    if narrowed:
        monkeypatch.setattr(channels, "MULTIPLE", 8)
        monkeypatch.setattr(
            narrow, "choose_widths", lambda *_: {f"model.layers.{i}.mlp": [48, 40] for i in range(narrowed)}
        )
    expected = run(None, config, family=family)
    assert replaced(expected)
    if little_memory:
        take_little_memory(monkeypatch.setattr)
    stems: list[str] = []
    with monkeypatch.context() as patch:
        write = NoState.write
        patch.setattr(NoState, "write", lambda state, stem, *args: (stems.append(stem), write(state, stem, *args))[1])
        assert_same(run(None, config, family=family), expected)
    step = 1 if fuzzing else 7  # files and state.json alternate: both are met
    writes = stopped_at_every_write(config, family, folder, expected, monkeypatch, step=step)
    # Each file of sums or of one linear is listed at once, those of the cut together, those of the modules by layer.
    files = Counter(stem.partition("-")[0] for stem in stems)
    listed = files["first"] + files["second"] + bool(files["cut"]) + LAYERS
    # The state, block influence, the widths and the decision are in state.json alone.
    assert files["narrow"] == narrowed
    assert writes == 3 + config.narrows + 2 * sums + files.total() + listed  # the widths are listed together


@pytest.mark.parametrize(
    ("config", "step", "time", "continued"),
    [
        (BEST, SWEEP, 1, "0 of 2"),
        (BEST, SWEEP, 2, "1 of 2"),
        (BEST, "refit", 1, "2 of 2"),
        (GraspConfig(num_layers=1, scope="model", refit=True, **KFAC), "refit", 1, "1 of 1"),
    ],
)
def test_what_was_done_is_not_done_again(
    config: GraspConfig, step: str, time: int, continued: str, folder: Path
) -> None:
    steps, heard = list[tuple[str, int]](), list[str]()

    def note(now: str, done: int, total: int) -> None:
        if now != "prefix":
            steps.append((now, done))

    def stop(now: str, done: int, total: int) -> None:
        note(now, done, total)
        if steps.count((step, 1)) == time:
            raise Killed

    expected = run(None, config, progress=note)
    whole = steps.copy()
    steps.clear()
    with pytest.raises(Killed):
        run(folder, config, progress=stop)
    begun = [place for place, now in enumerate(steps) if now == (step, 1)][-1]
    steps.clear()
    assert_same(run(folder, config, progress=note, notify=heard.append), expected)
    assert heard == [f"resuming: {continued} sweeps done"]
    assert steps == whole[begun:]
    assert replaced(expected)


def test_a_layer_that_was_not_stored_whole_is_fitted_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = GraspConfig(num_layers=2, scope="model", refit=True, **KFAC)
    write = RunState.write

    def write_ten(state: RunState, *args: Any) -> str:
        if len(list(folder.glob("module-*"))) == 10:
            raise Killed
        return write(state, *args)

    with monkeypatch.context() as patch:
        patch.setattr(RunState, "write", write_ten)
        with pytest.raises(Killed):
            run(folder, config)
    assert len(list(folder.glob("module-*"))) == 10
    resumed: list[tuple[str, int]] = []
    again = run(folder, config, progress=lambda step, done, total: resumed.append((step, done)))
    assert_same(again, run(None, config))
    assert resumed == [("refit", layer + 1) for layer in range(LAYERS)]
    assert sum(module.reason == "" for module in again[0].modules) > 10


@pytest.mark.parametrize(("step", "time"), [("decompositions", 1), (SWEEP, 2), ("refit", 1)])
def test_a_run_is_continued_with_another_budget(
    step: str, time: int, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, count = run(None, BEST), 0

    def stop(now: str, done: int, total: int) -> None:
        nonlocal count
        count += (now, done) == (step, 2)
        if count == time:
            raise Killed

    with monkeypatch.context() as patch:
        take_little_memory(patch.setattr)
        with pytest.raises(Killed):
            run(folder, BEST, progress=stop)
    assert_same(run(folder, BEST), expected)


def stopped_after_the_first_cut(folder: Path) -> Path:
    """Stop ``best`` in its second sweep; a file of its first cut."""
    steps: list[str] = []

    def stop(step: str, done: int, total: int) -> None:
        steps.append(step)
        if steps.count(SWEEP) == BATCHES + 1:
            raise Killed

    with pytest.raises(Killed):
        run(folder, BEST, progress=stop)
    return min(folder.glob("cut-*"))


def test_the_first_cut_is_kept_until_the_decision(folder: Path) -> None:
    assert stopped_after_the_first_cut(folder).exists()
    assert not list(folder.glob("first*"))
    stopped(folder, "refit", 1, BEST)
    assert not list(folder.glob("cut*"))


def test_a_damaged_cut_is_refused(folder: Path) -> None:
    cut = stopped_after_the_first_cut(folder)
    data = bytearray(cut.read_bytes())
    data[-3] ^= 16
    cut.write_bytes(data)
    with pytest.raises(ResumeError, match=r"cut\S* is damaged \(its checksum is wrong\)"):
        run(folder, BEST)


def test_a_run_whose_files_would_not_fit_the_disk_is_not_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    usage = shutil.disk_usage(tmp_path)
    free = iter([usage.free, 1000])  # for the checkpoint, and for the run folder
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=next(free)))
    steps: list[str] = []
    samples = Samples(str(tmp_path / "text.txt"), num_samples=4, seq_len=32, batch_size=2)
    with pytest.raises(CheckpointError, match=r"needs .* GB, 0\.00 GB are free"):
        compress(
            *(str(tmp_path / "model"), tmp_path / "out", BEST, samples),
            progress=lambda step, done, total: steps.append(step),
        )
    assert "block influence" not in steps


def test_a_folder_of_an_earlier_format_is_refused_with_the_reason(folder: Path) -> None:
    stopped(folder, SWEEP, 1, BEST)
    path = folder / "state.json"
    state = json.loads(path.read_text())
    state["identity"]["format"] = 2
    del state["sha256"], state["files"], state["decision"], state["identity"]["costs"]
    (folder / "costs.json").write_text("{}")
    path.write_text(json.dumps(state))
    with pytest.raises(ResumeError, match="format is 12, expected 2"):
        run(folder, BEST)


def test_other_costs_are_refused(folder: Path) -> None:
    config = dataclasses.replace(BEST, compression_ratio=None, target_latency=0.8)
    expected = run(None, config, costs=costs())
    stopped(folder, "refit", 1, config, costs=costs())
    with pytest.raises(ResumeError, match=r"costs is \w{8}\.\.\., expected \w{8}\.\.\."):
        run(folder, config, costs=costs(call=500.0))
    assert_same(run(folder, config, costs=costs()), expected)


def test_costs_that_were_measured_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 100)
    samples = Samples(str(tmp_path / "text.txt"), num_samples=4, seq_len=32, batch_size=2)
    config = dataclasses.replace(BEST, compression_ratio=None, target_latency=0.8)
    measured = iter([costs(), costs(call=500.0), costs()])
    monkeypatch.setattr(bench_costs, "measure_costs", lambda *args, **options: next(measured))

    def compressed(output: str, progress: Progress = no_progress) -> bytes:
        compress(str(tmp_path / "model"), tmp_path / output, config, samples, progress=progress)
        return (tmp_path / output / "model.safetensors").read_bytes()

    with pytest.raises(Killed):
        compressed("out", stop_at("refit", 1))
    continued = compressed("out")
    assert next(measured) == costs(call=500.0)  # nobody asked for it
    assert continued == compressed("whole")


def test_removed_layers_and_low_rank_linears_come_back_together(folder: Path) -> None:
    config = GraspConfig(target_latency=0.4, scope="model", refit=True, form="pivoted", **KFAC)
    table, held_out = dataclasses.replace(costs(), layer=2000.0), tiny_batches(1, seed=3)
    expected = run(None, config, costs=table, held_out=held_out)
    assert expected[0].removed_layers
    assert replaced(expected)
    stopped(folder, "refit", 1, config, costs=table, held_out=held_out)
    assert_same(run(folder, config, costs=table, held_out=held_out), expected)
