"""A folder in which a run keeps what it has done; it is whole at whatever instant the process is killed."""

from __future__ import annotations

import json
import os
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

from grasp.errors import ResumeError
from grasp.files import differences, tensors_digest
from grasp.progress import Clock, Notify, no_notify

Folder = TypeVar("Folder", bound="RunFolder")

INTERVAL = 30.0  # seconds: what grows step by step is not written more often than this,
WRITE_FRACTION = 0.05  # nor so often that writing takes more than this fraction of the time
_UNFINISHED = "unfinished"  # the folder in which files are written, by safetensors under names of its own


class RunFolder:
    """What the folders of all kinds of runs have in common; a context manager.

    While it is open, no other process may use the folder. When its block ends well the folder is removed; when it ends
    in an exception, or the process is killed, the folder stays. It holds ``state.json``, which says whose it is, and
    safetensors files with their notes and a checksum in the header.

    Args:
        folder: new, or as an earlier run left it.
        notify: called with one line where a run is continued or interrupted.
        rank: which of the processes that share the work this is.
        processes: how many share the work; all see the same folder.

    Raises:
        ResumeError: on entering, if the folder is in use, is something else, or cannot be written.
    """

    FILES: ClassVar[str]  # pattern of the names of the safetensors files

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._notify, self._rank, self._processes = notify, rank, processes
        self._lock = FileLock(self.folder / "lock")
        self._fingerprint: dict[str, Any] | None = None
        self._clock = Clock()
        self._has_progress = False  # an earlier run left something, or this one wrote more than it can redo at once
        self._written = self._cost = 0.0  # when what grows was last written, and the seconds it took
        self._made: list[Path] = []  # folders that were not there before

    def __enter__(self: Folder) -> Folder:
        if self._rank:
            return self
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(path.name for path in self.folder.iterdir() if not self._belongs(path))
            if foreign:
                raise ResumeError(
                    f"{self.folder} is where an unfinished run is kept, but it holds {foreign[0]}, which is none of "
                    "its files; move that folder away, or give another output"
                )
            self._lock.acquire(timeout=0)
            shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
            (self.folder / _UNFINISHED).mkdir(exist_ok=True)
        except Timeout as error:
            raise ResumeError(f"{self.folder} is in use by another process; wait for it, or end it") from error
        except (OSError, NotImplementedError) as error:
            raise ResumeError(
                f"{self.folder} cannot be used to keep the run: {error}. Give an output that can be written to"
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
            self._notify(f"the same command continues this run; it is kept in {self.folder}")
        self._lock.release()
        for folder in self._made:
            with suppress(OSError):  # not empty
                folder.rmdir()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Whether a run that did not end well leaves anything."""
        return self._has_progress

    def _belongs(self, path: Path) -> bool:
        return re.fullmatch(rf"lock|state\.json|{self.FILES}|{_UNFINISHED}", path.name) is not None

    def _require_same(self, kept: Mapping[str, Any]) -> None:
        """Check that the folder belongs to this request, whose identity is ``_identity``.

        Raises:
            ResumeError: with what is different.
        """
        assert self._fingerprint is not None
        if changed := differences(self._fingerprint, kept):
            raise ResumeError(
                f"{self.folder} holds an unfinished run of another request: {changed}. Give the request that it was "
                "begun with to continue it, or delete that folder to start anew"
            )

    def _write_is_due(self) -> bool:
        """Whether what grows may be written again."""
        return time.monotonic() - self._written >= max(INTERVAL, self._cost / WRITE_FRACTION)

    @contextmanager
    def _timed_write(self) -> Iterator[None]:
        """Take note of what writing costs."""
        start = time.monotonic()
        yield
        self._written = time.monotonic()
        self._cost = self._written - start

    def _write_json(self, kept: Mapping[str, Any]) -> None:
        with self._replacing(self.folder / "state.json") as temporary:
            temporary.write_text(json.dumps(kept, indent=2), encoding="utf-8")

    def _read_json(self) -> dict[str, Any]:
        path = self.folder / "state.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise self._damaged(path, str(error)) from error

    def _write(self, path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        notes = {**notes, "seconds": self._clock.seconds, "sha256": tensors_digest(sorted(plain.items()))}
        with self._replacing(path) as temporary:
            save_file(plain, temporary, {"grasp": json.dumps(notes)})
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

    def _damaged(self, path: Path, why: str) -> ResumeError:
        return ResumeError(f"{path} is damaged ({why}); delete the folder {self.folder} to start anew")

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
        """A file to write, which takes the place of ``path`` in one step once it is on the disk."""
        temporary = path.parent / _UNFINISHED / path.name
        try:
            yield temporary
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            with suppress(OSError):
                temporary.unlink()
            raise ResumeError(
                f"writing {path} failed: {error}. What was kept before is whole: make room, and give the same command "
                "to continue"
            ) from error
