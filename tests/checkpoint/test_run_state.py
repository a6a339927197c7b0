from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp.checkpoint import run_folder
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.compression import held_out
from grasp.config import GraspConfig
from grasp.errors import CheckpointError, ResumeError
from tests import interrupted
from tests.interrupted import (
    BATCHES,
    CONFIG,
    Killed,
    assert_same,
    run,
    stop_at,
    stopped,
    stopped_at_every_write,
    stored,
)
from tests.tiny_models import tiny_batches, tiny_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "out.partial"


@pytest.fixture
def every_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the sums of a sweep after every batch."""
    monkeypatch.setattr(run_folder, "INTERVAL", 0.0)
    monkeypatch.setattr(run_folder, "WRITE_FRACTION", float("inf"))


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        ("qwen2", {"schedule": "per-layer", "sweep_dtype": "bfloat16"}),  # with biases
        ("gpt2", {"schedule": "single-sweep", "threshold_ratio": 0.6}),
    ],
)
@pytest.mark.usefixtures("every_batch")
def test_a_run_stopped_at_any_write_ends_as_if_it_had_not_been(
    family: str, options: dict[str, Any], folder: Path, monkeypatch: pytest.MonkeyPatch, fuzzing: bool
) -> None:
    config = GraspConfig(layers=(0, 2), retain_ratio=0.4 if "threshold_ratio" not in options else 0.1, **options)
    expected = run(None, config, family=family)
    step = 1 if fuzzing else 7  # files and state.json alternate: both are met
    writes = stopped_at_every_write(config, family, folder, expected, monkeypatch, step=step)
    sweeps = {"sequential": 4, "per-layer": 2, "single-sweep": 1}[config.schedule]
    # A file and state.json for sums and for the groups of a linear. A file for each module, state.json for each sweep.
    assert writes == 2 + sweeps * (2 * BATCHES + 1) + 3 * len(expected[0].modules)


@pytest.mark.usefixtures("every_batch")
def test_a_run_stopped_many_times_goes_on_each_time(folder: Path) -> None:
    steps: list[tuple[str, int]] = []
    run(None, progress=lambda step, done, total: steps.append((step, done)))
    for step, done in steps[BATCHES:]:
        if step != "prefix":
            stopped(folder, step, done)
    assert_same(run(folder), run(None))


@pytest.mark.usefixtures("every_batch")
def test_what_is_done_is_not_done_again(folder: Path) -> None:
    stopped(folder, "layer 0 mlp", 2)
    steps: list[tuple[str, int]] = []
    run(folder, progress=lambda step, done, total: steps.append((step, done)))
    assert [step for step in steps if step[0] != "prefix"] == [
        ("layer 0 mlp", 3),
        *(("decompositions", done) for done in (1, 2, 3)),
        *(("layer 0 attention", done) for done in (1, 2, 3)),
        *(("decompositions", done) for done in (1, 2, 3, 4)),
    ]


def test_sums_are_not_kept_more_often_than_the_interval(folder: Path) -> None:
    stopped(folder, "layer 2 mlp", 2)
    assert not list(folder.glob("sums*"))
    stopped(folder, "layer 2 mlp", 3)
    assert len(list(folder.glob("sums*"))) == 1


def test_writing_is_held_to_its_share_of_the_time(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(run_folder.time, "monotonic", lambda: now[0])
    with RunState(folder) as state:
        monkeypatch.setattr(state, "write", lambda *_: now.__setitem__(0, now[0] + 10))
        written = []
        for second in range(0, 1000, 5):
            now[0] = max(now[0], second)
            before = now[0]
            state.store_sums({}, 1, 2)
            if now[0] > before:
                written.append(before)
        assert written == [30, 240, 450, 660, 870]


@pytest.mark.usefixtures("every_batch")
def test_a_continued_run_is_announced_and_a_new_one_is_not(folder: Path) -> None:
    heard: list[str] = []
    with pytest.raises(Killed):
        run(folder, notify=heard.append, progress=stop_at("layer 0 mlp", 1))
    assert heard == []
    run(folder, notify=heard.append)
    assert heard == ["resuming: 2 of 4 sweeps done"]


def test_an_interrupted_run_says_how_to_go_on(folder: Path) -> None:
    heard: list[str] = []

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "prefix":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(folder, notify=heard.append, progress=interrupt)
    assert [line.endswith(f"stored in {folder}") for line in heard] == [True]


def test_a_run_that_kept_nothing_leaves_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "out.partial"
    with pytest.raises(Killed):
        run(folder, progress=stop_at("block influence", 1))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=re.escape("layers=[9]")):
        run(folder, GraspConfig(layers=(9,)))
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_fails_before_its_first_sweep_leaves_nothing(folder: Path) -> None:
    with pytest.raises(ValueError, match="the largest possible ratio is"):
        run(folder, GraspConfig(compression_ratio=0.9))
    assert not folder.exists()


def test_a_state_stays_when_the_next_run_fails_before_it_is_used(folder: Path) -> None:
    stopped(folder, "prefix", 1)
    before = {path.name for path in folder.iterdir()}
    with pytest.raises(ValueError, match="the model cannot be loaded"), RunState(folder):
        raise ValueError("the model cannot be loaded")
    with RunState(folder):
        pass
    assert {path.name for path in folder.iterdir()} == before


def test_linears_that_do_not_reach_the_loss_are_kept_as_such(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(model: Any) -> Any:
        block = model.model.layers[2].mlp
        block.register_forward_hook(lambda module, args, output: output.detach())
        return model

    original = tiny_model
    monkeypatch.setattr(interrupted, "tiny_model", lambda *args, **options: cut(original(*args, **options)))
    expected = run(None)
    assert sum("does not reach" in module.reason for module in expected[0].modules) == 3
    stopped(folder, "layer 0 mlp", 1)
    assert_same(run(folder), expected)


@pytest.mark.usefixtures("every_batch")
def test_the_time_of_earlier_processes_counts(folder: Path) -> None:
    stopped(folder, "layer 0 attention", 2)
    seconds = json.loads((folder / "state.json").read_text())["seconds"]
    assert seconds["block_influence"] > 0
    report, _ = run(folder)
    assert report.seconds["attribution"] > seconds["attribution"] > 0
    assert report.seconds["block_influence"] >= seconds["block_influence"]
    assert set(report.seconds) == {"identity", "block_influence", "prefix", "attribution", "svd and selection"}
    assert set(run(None)[0].seconds) == set(report.seconds) - {"identity"}


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"config": GraspConfig(layers=(0, 2), retain_ratio=0.3)}, "retain_ratio is 0.3, expected 0.4"),
        ({"config": GraspConfig(layers=(1, 2), retain_ratio=0.4)}, r"layers is \[1, 2\], expected \[0, 2\]"),
        ({"seed": 5}, r"model weights is \w{8}\.\.\., expected \w{8}\.\.\."),
        ({"dtype": torch.bfloat16}, "model dtype is bfloat16, expected float32"),
        ({"rms_norm_eps": 1e-3}, "model configuration is"),
        ({"family": "mistral"}, "model is MistralForCausalLM, expected LlamaForCausalLM"),
    ],
)
def test_another_request_is_refused_with_the_reason(folder: Path, changed: dict[str, Any], reason: str) -> None:
    stopped(folder, "layer 0 mlp", 1)
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(ResumeError, match=f"{reason}.*delete the folder"):
        run(folder, **changed)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    run(folder)


def test_another_text_is_refused_with_the_reason(folder: Path) -> None:
    stopped(folder, "layer 0 mlp", 1)
    other = tiny_batches(BATCHES)
    other[1][0, 3] += 1
    message = r"calibration tokens is \w{8}\.\.\., expected"
    with pytest.raises(ResumeError, match=message), RunState(folder) as state:
        compress_(tiny_model("llama"), other, CONFIG, state=state)


@pytest.mark.parametrize("processes", [1, 3])
def test_another_number_of_processes_is_refused(folder: Path, processes: int) -> None:
    model, batches = tiny_model("llama"), tiny_batches(BATCHES)
    with pytest.raises(Killed), RunState(folder, processes=2) as state:
        compress_(model, batches, CONFIG, state=state, progress=stop_at("layer 0 mlp", 1))
    message = f"processes is {processes}, expected 2"
    with pytest.raises(ResumeError, match=message), RunState(folder, processes=processes) as state:
        compress_(tiny_model("llama"), batches, CONFIG, state=state)


def test_a_partly_compressed_model_is_refused(folder: Path) -> None:
    model, batches = tiny_model("llama"), tiny_batches(BATCHES)
    with pytest.raises(Killed), RunState(folder) as state:
        compress_(model, batches, CONFIG, state=state, progress=stop_at("layer 0 mlp", 1))
    with pytest.raises(ResumeError, match="model weights is"), RunState(folder) as state:
        compress_(model, batches, CONFIG, state=state)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 16
    path.write_bytes(data)


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_json(path: Path) -> None:
    path.write_text('{"identity": 1}')


DAMAGE = [
    ("state.json", other_json),
    ("state.json", truncate),
    ("state.json", empty),
    ("module-model.layers.2.mlp.up_proj", truncate),
    ("module-model.layers.2.mlp.up_proj", flip),
    ("module-model.layers.2.mlp.up_proj", empty),
    ("module-model.layers.2.mlp.up_proj", Path.unlink),
    ("sums-0-of-1", truncate),
    ("sums-0-of-1", flip),
]


@pytest.mark.parametrize(("name", "damage"), DAMAGE)
@pytest.mark.usefixtures("every_batch")
def test_a_damaged_state_is_refused(folder: Path, name: str, damage: Callable[[Path], None]) -> None:
    stopped(folder, "layer 0 mlp", 2)
    path = folder / name if name == "state.json" else stored(folder, name)
    damage(path)
    remedy = "delete this file to repeat its sweep" if name.startswith("sums") else f"delete the folder {folder}"
    with pytest.raises(ResumeError, match=f"{re.escape(str(path))}.*; .*{re.escape(remedy)}"):
        run(folder)
    assert folder.exists()


@pytest.mark.parametrize(("step", "done"), [("layer 0 mlp", 2), ("decompositions", 2)])
@pytest.mark.usefixtures("every_batch")
def test_sums_that_are_gone_are_summed_again(folder: Path, step: str, done: int) -> None:
    stopped(folder, step, done)
    stored(folder, "sums-0-of-1").unlink()
    assert_same(run(folder), run(None))


def test_a_folder_in_use_is_refused(folder: Path) -> None:
    with RunState(folder):
        with pytest.raises(ResumeError, match="is in use by another process"), RunState(folder):
            pass
        assert folder.exists()


@pytest.mark.parametrize("is_new", [True, False])
def test_a_folder_that_cannot_be_set_up_is_neither_locked_nor_left(
    folder: Path, is_new: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not is_new:
        folder.mkdir()
    make = Path.mkdir

    def full(path: Path, **options: Any) -> None:
        if path.name == "unfinished":
            raise OSError(errno.ENOSPC, "No space left on device")
        make(path, **options)

    state = RunState(folder)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", full)
        with pytest.raises(ResumeError, match=r"cannot store the run: .*No space left"):
            state.__enter__()
    assert folder.exists() == (not is_new)
    with RunState(folder):
        assert folder.exists()


def test_a_folder_of_something_else_is_refused_and_left_alone(folder: Path) -> None:
    folder.mkdir()
    (folder / "thesis.tex").write_text("years of work")
    with pytest.raises(ResumeError, match=r"contains thesis\.tex"):
        run(folder)
    assert [path.name for path in folder.iterdir()] == ["thesis.tex"]


def test_a_place_that_cannot_be_written_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResumeError, match=r"Not a directory"):
        run(tmp_path / "file" / "out.partial")


def test_a_failed_write_leaves_the_stored_progress(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(tensors: Any, path: Path, notes: Any) -> None:
        if "layers.2.mlp.up_proj" in path.name:
            path.write_bytes(b"half")
            raise OSError(28, "No space left on device")
        save(tensors, path, notes)

    save = run_folder.save_file
    monkeypatch.setattr(run_folder, "save_file", full)
    with pytest.raises(ResumeError, match=r"up_proj\S* failed: .*No space left"):
        run(folder)
    assert not list((folder / "unfinished").iterdir())
    monkeypatch.setattr(run_folder, "save_file", save)
    heard: list[str] = []
    assert_same(run(folder, notify=heard.append), run(None))
    assert heard == ["resuming: 0 of 4 sweeps done"]


def test_a_sweep_whose_sums_would_not_fit_the_disk_is_not_begun(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(folder.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    steps: list[str] = []
    with pytest.raises(CheckpointError, match=r"needs .* GB, 0\.00 GB are free"):
        run(folder, progress=lambda step, done, total: steps.append(step))
    assert "layer 2 mlp" not in steps


def test_nothing_that_is_read_can_run_code(folder: Path) -> None:
    stopped(folder, "layer 0 mlp", 1)
    assert {path.suffix for path in folder.iterdir()} == {"", ".json", ".safetensors"}
    assert (folder / "lock").read_bytes() == b""
    assert not list((folder / "unfinished").iterdir())


def test_what_a_killed_process_was_writing_is_removed(folder: Path) -> None:
    stopped(folder, "layer 0 mlp", 1)
    (folder / "unfinished" / ".tmpA1b2C3").write_bytes(b"half")
    with RunState(folder):
        assert not list((folder / "unfinished").iterdir())
    stopped(folder, "layer 0 mlp", 1)
    (folder / "unfinished" / ".tmpA1b2C3").write_bytes(b"half")
    assert_same(run(folder), run(None))
    assert not folder.exists()


def test_the_batch_size_of_the_run_to_be_continued_is_known_before(folder: Path) -> None:
    with RunState(folder) as state:
        assert state.batch_size is None
    stopped(folder, "layer 0 mlp", 1)
    with RunState(folder) as state:
        assert state.batch_size == 2


def test_ranks_keep_their_own_sums_and_only_the_first_lists_files(folder: Path) -> None:
    model, batches = tiny_model("llama"), tiny_batches(BATCHES)
    with RunState(folder, processes=2) as first, RunState(folder, rank=1, processes=2) as second:
        with pytest.raises(Killed):
            compress_(model, batches, CONFIG, state=second, progress=stop_at("layer 2 mlp", BATCHES))
        assert {path.name for path in folder.iterdir()} == {"lock", stored(folder, "sums-1-of-2").name, "unfinished"}
        first._has_progress = True


def test_a_folder_that_cannot_be_removed_is_named_and_can_be_opened_again(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, *, missing_ok: bool = False) -> None:
        raise OSError(5, "Input/output error", str(path))

    with pytest.raises(ResumeError, match=rf"{re.escape(str(folder))} cannot be removed.*delete it"), RunState(folder):
        monkeypatch.setattr(Path, "unlink", fail)
    with pytest.raises(KeyboardInterrupt), RunState(folder):
        raise KeyboardInterrupt  # is not hidden by the other error
    monkeypatch.undo()
    with RunState(folder):
        pass
    assert not folder.exists()


@pytest.mark.parametrize("make", [os.mkfifo, Path.touch, lambda path: path.symlink_to(path.parent)])
def test_an_unfinished_subfolder_that_is_none_is_refused(folder: Path, make: Callable[[Path], None]) -> None:
    folder.mkdir()
    make(folder / "unfinished")
    with pytest.raises(ResumeError, match=r"contains unfinished, which no run writes"), RunState(folder):
        pass
    assert os.path.lexists(folder / "unfinished")


def test_losses_that_a_uniform_budget_is_compared_with_are_measured_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured, measure = [], held_out._measured
    monkeypatch.setattr(held_out, "_measured", lambda *given: measured.append(given[-1].name) or measure(*given))
    others = tiny_batches(1, seed=2)
    stopped(folder, "prefix", 1, held_out=others)
    assert len(measured) == 2  # the dense model, and without layers
    report, _ = run(folder, held_out=others)
    assert len(measured) == 2
    assert report.held_out_loss.keys() >= set(measured)
