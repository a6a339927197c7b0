"""A folder that stores the progress of a run. It stays valid if the process is killed at any instant."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, TypeVar

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from grasp.checkpoint.fingerprint import differences
from grasp.errors import ResumeError
from grasp.files import replacing, tensors_digest
from grasp.progress import Clock, Notify, no_notify

Folder = TypeVar("Folder", bound="RunFolder")

INTERVAL = 30.0  # seconds, at least, between two writes of data that grows step by step
WRITE_FRACTION = 0.05  # of the run time, at most, is spent on these writes
_UNFINISHED = "unfinished"  # subfolder for files that are being written; safetensors also writes temporary files there


class RunFolder:
    """The base class of run folders; a context manager.

    The folder is locked while it is open. It is removed when the ``with`` block ends normally. It stays after an
    exception or a kill. It contains ``state.json`` with the fingerprint of the run, and safetensors files with notes
    and a checksum in their headers.

    Args:
        folder: a new folder, or the folder of an unfinished run.
        notify: called with one line of text when a run resumes or is interrupted.
        rank: rank of this process.
        processes: number of processes that share the work. All use the same folder; rank 0 writes.

    Raises:
        ResumeError: on entering, if another process uses the folder, it contains other files, or it is not writable.
    """

    FILES: ClassVar[str]  # regular expression for the names of the files besides state.json

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._notify, self._rank, self._processes = notify, rank, processes
        self._lock = FileLock(self.folder / "lock")
        self._fingerprint: dict[str, Any] | None = None
        self._clock = Clock()
        self._has_progress = False  # whether the folder holds work worth resuming
        self._last_write = self._write_seconds = 0.0  # time and duration of the last write of growing data
        self._created: list[Path] = []  # folders that did not exist before

    def __enter__(self: Folder) -> Folder:
        if self._rank:
            return self
        self._created = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(path.name for path in self.folder.iterdir() if not self._belongs(path))
            if foreign:
                raise ResumeError(
                    f"{self.folder} is reserved for an unfinished run, but it contains {foreign[0]}, which no run "
                    "writes; move that folder, or choose another output"
                )
            self._lock.acquire(timeout=0)
            shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
            (self.folder / _UNFINISHED).mkdir(exist_ok=True)
        except Timeout as error:
            raise ResumeError(f"{self.folder} is in use by another process; wait for it or stop it") from error
        except (OSError, NotImplementedError) as error:
            raise ResumeError(
                f"{self.folder} cannot store the run: {error}. Choose an output in a writable folder"
            ) from error
        self._has_progress = (self.folder / "state.json").exists()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rank:
            return
        if (kind is None and self._fingerprint is not None) or not self._is_worth_keeping(error):
            self._clear()
        elif kind is KeyboardInterrupt:
            self._notify(f"run the same command again to resume; progress is stored in {self.folder}")
        self._lock.release()
        for folder in self._created:
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Whether the folder stays after a failed or interrupted run."""
        return self._has_progress

    def _belongs(self, path: Path) -> bool:
        return re.fullmatch(rf"lock|state\.json|{self.FILES}|{_UNFINISHED}", path.name) is not None

    def _require_same(self, stored: Mapping[str, Any]) -> None:
        """Compare the stored fingerprint with ``_fingerprint``, the one of this run.

        Raises:
            ResumeError: if they differ; the message has the differences.
        """
        assert self._fingerprint is not None
        if changed := differences(self._fingerprint, stored):
            raise ResumeError(
                f"{self.folder} contains an unfinished run with other inputs: {changed}. Repeat the original command "
                "to resume that run, or delete the folder to start again"
            )

    def _write_is_due(self) -> bool:
        """Whether growing data may be written again."""
        return time.monotonic() - self._last_write >= max(INTERVAL, self._write_seconds / WRITE_FRACTION)

    @contextmanager
    def _timed_write(self) -> Iterator[None]:
        """Measure a write of growing data."""
        start = time.monotonic()
        yield
        self._last_write = time.monotonic()
        self._write_seconds = self._last_write - start

    def _write_json(self, state: Mapping[str, Any]) -> None:
        with self._replacing(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps(state, indent=2), encoding="utf-8")

    def _read_json(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(path, str(error)) from error

    def _write(self, path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        notes = {**notes, "seconds": self._clock.seconds, "sha256": tensors_digest(sorted(on_cpu.items()))}
        with self._replacing(path) as temporary:
            save_file(on_cpu, temporary, {"grasp": json.dumps(notes)})
        self._has_progress = True

    def _read(self, path: Path, *, only_notes: bool = False) -> tuple[dict[str, Tensor], dict[str, Any]]:
        try:
            with safe_open(path, "pt") as file:
                notes = json.loads(file.metadata()["grasp"])
                tensors = {} if only_notes else {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, str(error)) from error
        if not only_notes and tensors_digest(sorted(tensors.items())) != notes["sha256"]:
            raise self._damaged(path, "its checksum is wrong")
        return tensors, notes

    def _damaged(self, path: Path, reason: str) -> ResumeError:
        return ResumeError(f"{path} is damaged ({reason}); delete the folder {self.folder} to start again")

    def _clear(self) -> None:
        for path in list(self.folder.iterdir()):
            if path.name == _UNFINISHED:
                shutil.rmtree(path, ignore_errors=True)
            elif self._belongs(path):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def _replacing(self, path: Path) -> Iterator[Path]:
        """Yield a temporary file, then flush it to the disk and rename it to ``path``."""
        try:
            with replacing(path, scratch=path.parent / _UNFINISHED) as temporary:
                yield temporary
        except (OSError, SafetensorError) as error:
            raise ResumeError(
                f"writing {path} failed: {error}. The progress stored before is valid: free disk space and run the "
                "same command again"
            ) from error
