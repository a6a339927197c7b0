"""What a recovery has done so far, kept in a folder: the same request after a kill goes on from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from grasp.checkpoint.run_folder import RunFolder
from grasp.checkpoint.saving import require_space
from grasp.progress import Clock

FORMAT = 1  # of the folder


class Snapshot(NamedTuple):
    """A training between two steps: its tensors, and what else there is to know, as JSON can hold it."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class NoRecoveryState:
    """The state of a recovery that keeps nothing; what it does is what ``RecoveryState`` is asked for."""

    def begin(self, fingerprint: Mapping[str, Any], clock: Clock) -> None:
        """Take up what was kept of the request with this fingerprint; ``clock`` goes on from the time that it took."""

    def restored(self) -> Snapshot | None:
        """What was kept, if anything."""
        return None

    def keep(self, snapshot: Callable[[], Snapshot], *, last: bool = False) -> None:
        """Keep a snapshot now and then, and the last one."""


class RecoveryState(RunFolder, NoRecoveryState):
    """A folder that holds what a run of ``recover_`` has done: give it as ``state``.

    A context manager. While it is open, no other process may use the folder. When its block ends well the folder is
    removed, so save the model inside the block; when it ends in an exception, or the process is killed at whatever
    instant, the folder stays, and the same call goes on from there, at most half a minute back, or 20 times as long as
    writing takes. It then ends with the same weights, bit for bit, on the same machine with the same number of threads.

    It holds factors and the optimizer's two moments in fp32, and the best factors so far: for an fp32 model 16 bytes
    per trained parameter. Of several processes the first writes, and all read.

    Raises:
        ResumeError: on entering, if the folder is in use, is something else, or cannot be written; from ``recover_`` if
            it belongs to another request (another model, data or configuration), is damaged, or cannot be written.
    """

    FILES = r"training\.safetensors"

    @property
    def _training(self) -> Path:
        return self.folder / "training.safetensors"

    def begin(self, fingerprint: Mapping[str, Any], clock: Clock) -> None:
        """Check that the folder belongs to this request, or make it so; the clock goes on from the time kept there.

        Raises:
            ResumeError: if it does not, or is damaged.
        """
        self._clock = clock
        self._fingerprint = {"format": FORMAT, "processes": self._processes, **fingerprint}
        if not (self.folder / "state.json").exists():
            self._write_json({"identity": self._fingerprint})
            return
        self._require_same(self._read_json()["identity"])
        if self._training.exists():
            _, notes = self._read(self._training, only_notes=True)
            clock.add(notes["seconds"])
            self._notify(f"continuing after {notes['step']} of {notes['steps']} steps")

    def restored(self) -> Snapshot | None:
        """What was kept, if anything.

        Raises:
            ResumeError: if it is damaged.
        """
        return Snapshot(*self._read(self._training)) if self._training.exists() else None

    def keep(self, snapshot: Callable[[], Snapshot], *, last: bool = False) -> None:
        """Keep a snapshot now and then, and the last one.

        Raises:
            ResumeError: if it cannot be written.
            CheckpointError: if there is too little space.
        """
        if self._rank or not (last or self._write_is_due()):
            return
        with self._timed_write():
            tensors, notes = snapshot()
            require_space(self._training, sum(tensor.nbytes for tensor in tensors.values()))
            self._write(self._training, tensors, notes)
