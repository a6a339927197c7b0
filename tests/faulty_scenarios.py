"""Writes under ``faulty_calls.c``: each call of the system fails in turn. ``tests/test_durability.py`` runs this file.

Prints one JSON object: what went wrong, how many faults were tried, and the order of the calls of two writes.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from grasp.checkpoint.saving import save_checkpoint
from grasp.config import GraspConfig
from grasp.errors import GraspError
from grasp.files import contents, replacing, tensors_digest, write_whole
from grasp.workflows.compress import compress
from grasp.workflows.samples import Samples
from tests import interrupted
from tests.command_line import TEXT, save_tiny_model
from tests.tiny_models import tiny_model

ONCE, ON_A_FULL_DISK, KILL = range(3)
FAULTS = {"ENOSPC": (errno.ENOSPC, ONCE), "EIO": (errno.EIO, ONCE), "full": (errno.ENOSPC, ON_A_FULL_DISK)}
Tree = dict[str, str]  # relative path → digest; folders have none

CALLS: list[str] = []  # the last calls, also of a call of ``watched`` that raised
library = ctypes.CDLL(None)
library.faults_end.restype = ctypes.c_char_p


@dataclass(frozen=True)
class Write:
    """A write into a folder: what is there before, and the call that changes it."""

    before: Callable[[Path], Any]
    run: Callable[[Path], Any]


def watched(folder: Path, run: Callable[[Path], Any], at: int = 0, code: int = 0, mode: int = ONCE) -> list[str]:
    """Run, with a fault in call ``at``, and return all calls below the folder, by paths relative to it."""
    library.faults_start(os.fsencode(folder), at, code, mode)
    try:
        run(folder)
    finally:
        CALLS[:] = library.faults_end().decode().replace(f" {folder}/", " ").splitlines()
    return list(CALLS)


def tree(folder: Path) -> Tree:
    """The files of a folder with their digests."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in folder.rglob("*")
    }


def writes() -> Iterator[tuple[str, Write]]:
    """All ways to write: a checkpoint, a file, and a file of a run folder, each new or in place of a former one."""
    model = tiny_model("llama", num_hidden_layers=1)

    def save(folder: Path, **extra: str) -> None:
        save_checkpoint(model, folder / "out", extra_files=extra, overwrite=True)

    def write(folder: Path) -> None:
        write_whole(folder / "file", "new", seen=contents(folder / "file"))

    def store(folder: Path) -> None:
        try:
            with replacing(folder / "sums.safetensors", scratch=folder / "unfinished") as temporary:
                save_file({"x": torch.ones(3)}, temporary)
        except (OSError, SafetensorError) as error:  # as the run folder does, which has its own tests
            raise GraspError from error

    def scratch(folder: Path) -> None:
        (folder / "unfinished").mkdir()

    yield "new checkpoint", Write(lambda folder: None, lambda folder: save_checkpoint(model, folder / "a/b/out"))
    yield "other checkpoint", Write(lambda folder: save(folder, former="former"), save)
    yield "new file", Write(lambda folder: None, write)
    yield "other file", Write(lambda folder: (folder / "file").write_text("former"), write)
    yield "file of a run", Write(scratch, store)


class Attack:
    """All faults of one write, each in a folder of its own."""

    def __init__(self, name: str, write: Write, folder: Path) -> None:
        self.name, self.write, self.folder = name, write, folder
        self.failures: list[str] = []
        self.faults = 0
        self.former = self._after(lambda folder: None)
        self.calls: list[str] = []
        self.new = self._after(lambda folder: self.calls.extend(watched(folder, write.run)))

    def _after(self, run: Callable[[Path], Any]) -> Tree:
        folder = self.folder / "tried"
        folder.mkdir(parents=True)
        try:
            self.write.before(folder)
            run(folder)
            return tree(folder)
        finally:
            shutil.rmtree(folder)

    def errors(self, at: int) -> None:
        """Let the call ``at`` fail: the former state or the new one is there, and nothing else."""
        for fault, (code, mode) in FAULTS.items():
            self.faults += 1

            def run(folder: Path, code: int = code, mode: int = mode, fault: str = fault) -> None:
                try:
                    watched(folder, self.write.run, at, code, mode)
                except GraspError as error:
                    if "\n" in str(error):
                        self.failures.append(f"{self.name}, {fault} at call {at}: several lines: {error}")

            after = self._after(run)
            call = CALLS[at - 1] if at <= len(CALLS) else ""
            stays = call.startswith("unlink ")  # what could not be removed
            if after not in (self.former, self.new) and not (stays and self._holds(after)):
                self.failures.append(f"{self.name}, {fault} at call {at} ({call}): {sorted(after)}")

    def kill(self, at: int) -> None:
        """End the process before the call ``at``: the former state or the new one is there, perhaps with more."""
        self.faults += 1

        def run(folder: Path) -> None:
            if (child := os.fork()) == 0:
                watched(folder, self.write.run, at, 0, KILL)
                os._exit(0)
            os.waitpid(child, 0)

        after = self._after(run)
        if not self._holds(after):
            self.failures.append(f"{self.name}, killed before call {at}: {sorted(after)}")

    def _holds(self, after: Tree) -> bool:
        return any(state.items() <= after.items() for state in (self.former, self.new))


def order(folder: Path) -> list[str]:
    """The calls of a compression from its model to the end of its run folder."""
    model = save_tiny_model(folder / "model")
    (folder / "text.txt").write_text(TEXT)
    (folder / "run").mkdir()
    samples = Samples(str(folder / "text.txt"), num_samples=2, seq_len=16)
    config = GraspConfig(layers=(1,), retain_ratio=0.4)
    return watched(folder / "run", lambda place: compress(str(model), place / "out", config, samples))


def resumes(folder: Path, config: GraspConfig, step: int) -> tuple[list[str], str]:
    """Let every ``step``-th call of a run fail, and resume it. Its weights must equal those of a run without faults."""

    def weights(place: Path) -> str:
        return tensors_digest(sorted(interrupted.run(place / "out.partial", config)[1].items()))

    expected, failures = weights(folder), []
    calls = len(watched(folder, weights))
    attempts = range(1, calls + 1, step)
    for attempt, at in enumerate(attempts):
        fault, (code, mode) = list(FAULTS.items())[attempt % len(FAULTS)]
        reason = ""
        try:
            watched(folder, weights, at, code, mode)
        except GraspError as error:
            reason = str(error)
        call = f"run, {fault} at call {at} ({CALLS[at - 1]})"
        try:
            if "The run no longer needs it" not in reason and weights(folder) != expected:
                failures.append(f"{call}: other weights")
        except GraspError as error:
            failures.append(f"{call}: not resumed: {error}")
        shutil.rmtree(folder / "out.partial", ignore_errors=True)
    return failures, f"{len(attempts)} in {calls} calls"


def main(folder: Path, step: int) -> None:
    """Try the faults in every ``step``-th call."""
    result: dict[str, Any] = {"failures": [], "faults": {}, "order": order(folder)}
    for name, write in writes():
        attack = Attack(name, write, folder / name.replace(" ", "-"))
        for at in range(1, len(attack.calls) + 1, step):
            attack.errors(at)
            attack.kill(at)
        result["failures"] += attack.failures
        result["faults"][name] = f"{attack.faults} in {len(attack.calls)} calls"
    interrupted.take_little_memory()
    for name, config in {"run": interrupted.CONFIG, "best": GraspConfig.best(compression_ratio=0.1)}.items():
        failures, result["faults"][name] = resumes(folder, config, 5 if step == 1 else 400)
        result["failures"] += failures
    print(json.dumps(result))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
