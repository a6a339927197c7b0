"""Runs that are killed at every call that changes a folder, from the one that puts the output in place to the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from grasp.config import GraspConfig
from grasp.errors import CheckpointError, ResumeError
from grasp.files import contents
from grasp.recovery import RecoveryConfig
from grasp.statistics.processes import Processes
from grasp.workflows.compress import compress
from grasp.workflows.recover import TrainingData, recover
from grasp.workflows.samples import Samples
from tests.command_line import TEXT, save_tiny_model
from tests.interrupted import Killed

pytestmark = pytest.mark.long

CHANGES = ("replace", "rename", "unlink", "rmdir")  # functions of os
Work = Callable[..., Any]


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Work]:
    place = tmp_path_factory.mktemp("inputs")
    save_tiny_model(place / "model")
    (place / "text.txt").write_text(TEXT * 3)
    samples, config = Samples(str(place / "text.txt"), 2, 32), GraspConfig(layers=(1,), retain_ratio=0.4)
    compress(str(place / "model"), place / "small", config, samples)
    data = TrainingData(samples.source, None, 32)
    return {
        "compress": lambda output, seed=0: compress(
            str(place / "model"), output, config, Samples(samples.source, 2, 32, seed=seed)
        ),
        "recover": lambda output, seed=0: recover(
            place / "small", output, RecoveryConfig(1e-2, 600, 4, seed=seed), data
        ),
    }


@contextmanager
def killed_at(call: int, monkeypatch: pytest.MonkeyPatch, output: Path) -> Iterator[list[str]]:
    """Raise ``Killed`` in place of a call, counted from the one that makes the output, and of all later ones."""
    names: list[str] = []

    def counted(name: str, original: Work) -> Work:
        def change(*args: Any, **options: Any) -> Any:
            if names or str(output) in map(str, args[1:]):
                names.append(name)
                if len(names) > call:
                    raise Killed
            return original(*args, **options)

        return change

    with monkeypatch.context() as patch:
        for name in CHANGES:
            patch.setattr(os, name, counted(name, getattr(os, name)))
        yield names


@pytest.mark.parametrize("kind", ["compress", "recover"])
def test_a_run_killed_after_its_output_was_put_in_place_ends_when_repeated(
    kind: str, works: dict[str, Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fuzzing: bool
) -> None:
    def step(call: int) -> int:
        """The later calls remove one file of the run folder after the other."""
        return 1 if fuzzing or kind == "recover" or call < 4 else 4

    work, call, verified = works[kind], 0, 0
    work(tmp_path / "whole")
    weights = (tmp_path / "whole" / "model.safetensors").read_bytes()
    while True:
        output = tmp_path / f"out-{call}"
        with killed_at(call, monkeypatch, output) as names:
            try:
                work(output)
                break  # it has fewer calls
            except Killed:
                pass
        partial = output.with_name(f"{output.name}.partial")
        written = output.exists()
        before = contents(output)
        if written and not verified:
            with pytest.raises((ResumeError, CheckpointError), match=r"is not empty|calibration tokens"):
                work(output, seed=1)
        result = work(output)
        assert result.output == str(output)
        assert (output / "model.safetensors").read_bytes() == weights
        assert not partial.exists()
        if written:
            assert contents(output) == before
            verified += 1
        call += step(call)
    assert names
    assert verified >= 3
    assert work(output).output == str(output)  # again, when nothing of the run is left
    with pytest.raises(CheckpointError, match="is not empty"):
        work(output, seed=1)
    assert (output / "model.safetensors").read_bytes() == weights
    assert not output.with_name(f"{output.name}.partial").exists()


@pytest.mark.parametrize("kind", ["compress", "recover"])
def test_temporaries_are_removed_when_all_processes_have_checked_the_folder(
    kind: str, works: dict[str, Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The check makes one itself, which another process must not remove."""
    abandoned, there = tmp_path / ".out.00000000.partial", list[bool]()
    abandoned.touch()

    def least(_: Processes, number: int) -> int:
        there.append(abandoned.exists())
        return number

    monkeypatch.setattr(Processes, "least", least)
    works[kind](tmp_path / "out")
    assert there[0]
    assert not abandoned.exists()


def test_an_output_that_no_run_has_written_is_refused(
    works: dict[str, Work], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with killed_at(0, monkeypatch, output), pytest.raises(Killed):
        works["compress"](output)
    assert not output.exists()
    output.mkdir()
    (output / "report.json").write_text("{}")
    with pytest.raises(CheckpointError, match="is not empty"):
        works["compress"](output)
    assert (output / "report.json").read_text() == "{}"
