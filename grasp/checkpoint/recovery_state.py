"""The run folder of ``recover_``: an interrupted training resumes from it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from grasp.checkpoint.run_folder import RunFolder, read_data
from grasp.files import require_space


class Snapshot(NamedTuple):
    """The state of a training between two steps: tensors, and the rest as JSON."""

    tensors: Mapping[str, Tensor]
    notes: Mapping[str, Any]


class RecoveryState(RunFolder):
    """The run folder of ``recover_``, passed as ``state``; a context manager.

    The folder is locked while it is open. It is removed when the ``with`` block ends normally, so save the model inside
    the block. It stays after an exception or a kill, and the same call then resumes. A resumed run repeats at most the
    last 30 s, or 20 times the duration of one write if that is longer. It ends with the same weights, bit for bit, on
    the same machine with the same number of threads.

    The folder stores the factors and the two moments of the optimizer in fp32, and the best factors so far: 16 bytes
    per trained parameter of an fp32 model. Rank 0 writes; all processes read.

    Raises:
        ResumeError: on entering, as for ``RunFolder``; from ``recover_``, if the folder belongs to a run with another
            model, data or configuration, is damaged, or is not writable.
    """

    FORMAT = 2
    FILES = r"training\.(.+\.)?safetensors"  # format 1 has no digest in the name

    def load(self) -> Snapshot | None:
        """The stored snapshot, or ``None``."""
        if not self.files:
            return None
        tensors, notes = read_data(self.folder / self.files["training"])
        if not self._rank:
            self._notify(f"resuming after {notes['step']} of {notes['steps']} steps")
        return Snapshot(tensors, notes)

    def save(self, snapshot: Callable[[], Snapshot], *, last: bool = False) -> None:
        """Store a snapshot if a write is due, or if it is the ``last``.

        Raises:
            ResumeError: if writing fails.
            CheckpointError: if there is too little disk space.
        """
        if self._rank or not (last or self._write_is_due()):
            return
        with self._timed_write():
            tensors, notes = snapshot()
            require_space(self.folder, sum(tensor.nbytes for tensor in tensors.values()))
            self._list("training", self.write("training", tensors, notes))
            self._write_state()
