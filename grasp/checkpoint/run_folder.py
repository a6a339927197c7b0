"""A folder that stores the progress of a run. It stays valid if the process is killed at any instant."""

from __future__ import annotations

import hashlib
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

from grasp.checkpoint.fingerprint import differences
from grasp.errors import ResumeError
from grasp.files import expanded, replacing, sync
from grasp.progress import Clock, Notify, no_notify
from grasp.reading import open_regular, read_json

Folder = TypeVar("Folder", bound="RunFolder")

INTERVAL = 30.0  # seconds, at least, between two writes of data that grows step by step
WRITE_FRACTION = 0.05  # of the run time, at most, is spent on these writes
_UNFINISHED = "unfinished"  # subfolder for files that are being written; safetensors also writes temporary files there
_DIGITS = 32  # hexadecimal digits of a SHA-256 in the name of a file
_CHUNK = 2**20  # bytes that are hashed at a time


class RunFolder:
    """The base class of run folders; a context manager.

    The folder is locked while it is open. It is removed when the ``with`` block ends normally. It stays after an
    exception or a kill.

    Each data file is a safetensors file with notes in its header. Its name has the digest of its bytes, so a file is
    never overwritten. ``state.json`` is the manifest: the fingerprint of the run, the files that belong to it, and a
    digest of itself. It is written after the files that it lists. Files that it does not list are ignored and removed.
    Arguments: see ``grasp.checkpoint.run_state.RunState``.

    Raises:
        ResumeError: on entering, if another process uses the folder, it contains other files, its ``state.json`` is
            missing, or it is not writable.
    """

    FORMAT: ClassVar[int]  # version of the run folder
    FILES: ClassVar[str]  # regular expression for the names of the files that state.json lists
    CACHES: ClassVar[str] = "(?!)"  # and of files that it does not list, as the run can do without them; here none

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        self.folder = expanded(folder).resolve()
        self._notify, self._rank, self._processes = notify, rank, processes
        self._lock = FileLock(self.folder / "lock")
        self._manifest = self.folder / "state.json"
        self._fingerprint: dict[str, Any] | None = None
        self.files: dict[str, str] = {}  # stem → name of the file with its digest, as state.json lists it
        self._replaced: list[Path] = []  # files to remove when state.json no longer lists them
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
            self._require_own_files()
            self._lock.acquire(timeout=0)
            shutil.rmtree(self.folder / _UNFINISHED, ignore_errors=True)
            (self.folder / _UNFINISHED).mkdir(exist_ok=True)
        except Timeout as error:
            raise ResumeError(f"{self.folder} is in use by another process; wait for it or stop it") from error
        except (OSError, NotImplementedError) as error:
            if self.folder in self._created:
                with suppress(OSError):  # there is none
                    (self.folder / "lock").unlink()
            self._release()
            raise ResumeError(
                f"{self.folder} cannot store the run: {error}. Choose an output in a writable folder"
            ) from error
        self._has_progress = self._manifest.exists()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rank:
            return
        try:
            if (kind is None and self._fingerprint is not None) or not self._is_worth_keeping(error):
                self._clear()
            elif kind is KeyboardInterrupt:
                self._notify(f"run the same command again to resume; progress is stored in {self.folder}")
        except OSError as failure:
            if error is None:
                raise ResumeError(
                    f"{self.folder} cannot be removed: {failure}. The run no longer needs it; delete it"
                ) from failure
        finally:
            self._release()

    def _release(self) -> None:
        """Unlock the folder, and remove folders that did not exist before and are empty."""
        self._lock.release()
        for folder in self._created:
            with suppress(OSError):  # not empty
                folder.rmdir()

    @property
    def run(self) -> str:
        """A digest of the path and the fingerprint; in the report of the output, it tells that a run has ended."""
        return hashlib.sha256(json.dumps([str(self.folder), self._fingerprint]).encode()).hexdigest()

    def require_same(self, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
        """Set the fingerprint of this run, and compare it with the stored one; the stored state, {} if there is none.

        Raises:
            ResumeError: if they differ; the message has the differences. If ``state.json`` is damaged.
        """
        self._fingerprint = {"format": self.FORMAT, "processes": self._processes, **fingerprint}
        state = self._stored_state()
        if state and (changed := differences(self._fingerprint, state["identity"])):
            raise ResumeError(
                f"{self.folder} contains an unfinished run with other inputs: {changed}. Repeat the original command "
                "to resume that run, or delete the folder to start again"
            )
        return state

    def open_run(self, fingerprint: Mapping[str, Any], clock: Clock) -> dict[str, Any]:
        """Store the fingerprint of a new run, or verify the stored one and add its time; the stored state, {} if new.

        Raises:
            ResumeError: as ``require_same`` does; or if a file is missing or damaged.
        """
        self._clock = clock
        state = self.require_same(fingerprint)
        if not state:
            self._write_state()
            return {}
        self.files = state["files"]
        for name in self.files.values():
            self._verify(self.folder / name)
        if self._rank == 0:  # of a process that was killed before it had listed or removed them
            listed = {*self.files.values()}
            for path in list(self.folder.iterdir()):
                if re.fullmatch(self.FILES, path.name) and path.name not in listed:
                    path.unlink()
        clock.add(state["seconds"])
        return state

    def _state(self) -> dict[str, Any]:
        """What ``state.json`` has besides the entries of every run folder, as JSON values."""
        return {}

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Whether the folder stays after a failed or interrupted run."""
        return self._has_progress

    def _belongs(self, path: Path) -> bool:
        if path.name == _UNFINISHED:  # rmtree waits for the other end of a named pipe
            return path.is_dir() and not path.is_symlink()
        return re.fullmatch(rf"lock|state\.json|{self.FILES}|{self.CACHES}", path.name) is not None

    def _require_own_files(self) -> None:
        names = sorted(path.name for path in self.folder.iterdir())
        if foreign := [name for name in names if not self._belongs(self.folder / name)]:
            raise ResumeError(
                f"{self.folder} is reserved for an unfinished run, but it contains {foreign[0]}, which no run "
                "writes; remove that to resume the run, or choose another output"
            )
        data = [name for name in names if name not in ("lock", _UNFINISHED)]
        if data and not self._manifest.exists():
            raise self._damaged(self._manifest, f"it is missing, but the folder has {data[0]}")

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

    def write(self, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> str:
        """Write a data file; its name, which has its digest.

        Raises:
            ResumeError: if it cannot be written.
        """
        draft = self.folder / _UNFINISHED / stem
        on_cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        with self._writing(f"{stem}.safetensors"):
            try:
                save_file(on_cpu, draft, {"grasp": json.dumps(notes or {})})
                name = f"{stem}.{_file_digest(draft)[:_DIGITS]}.safetensors"
                with replacing(self.folder / name, scratch=draft.parent) as temporary:
                    draft.rename(temporary)
            finally:
                draft.unlink(missing_ok=True)
        self._has_progress = True
        return name

    def _list(self, stem: str, name: str | None) -> None:
        """Let the next ``state.json`` list a file under ``stem`` instead of the previous one; no file for ``None``."""
        previous = self.files.pop(stem, name)
        if name is not None:
            self.files[stem] = name
        if previous is not None and previous != name:
            self._replaced.append(self.folder / previous)

    def _write_state(self) -> None:
        """Write ``state.json``, then remove the files that it no longer lists. Rank 0 writes."""
        if self._rank:
            return
        state = {"identity": self._fingerprint, "files": self.files, **self._state()}
        state["seconds"] = self._clock.seconds
        with self._writing("state.json"), replacing(self._manifest, scratch=self.folder / _UNFINISHED) as temporary:
            temporary.write_text(json.dumps({**state, "sha256": _state_digest(state)}, indent=1), encoding="utf-8")
        while self._replaced:
            file = self._replaced.pop()
            with self._writing(file.name):
                file.unlink(missing_ok=True)

    def _stored_state(self) -> dict[str, Any]:
        """The content of ``state.json``; {} if there is none. Of an older format, only the identity is verified."""
        if not os.path.lexists(self._manifest):
            return {}
        state = read_json(self._manifest, f"the state of a run; {self._remedy}", ResumeError, finite=False)
        digest, identity = state.pop("sha256", None), state.get("identity")
        is_older = digest is None and isinstance(identity, dict) and identity.get("format") in range(1, self.FORMAT)
        if digest != _state_digest(state) and not is_older:
            raise self._damaged(self._manifest, "its checksum is wrong")
        return state

    def _verify(self, path: Path, remedy: str | None = None) -> None:
        """Check that a file has the digest of its name.

        Raises:
            ResumeError: if it has another one, or cannot be read.
        """
        if _file_digest(path, f"a file of the run; {remedy or self._remedy}")[:_DIGITS] != path.name.split(".")[-2]:
            raise self._damaged(path, "its checksum is wrong", remedy)

    @property
    def _remedy(self) -> str:
        return f"delete the folder {self.folder} to start again"

    def _damaged(self, path: Path, reason: str, remedy: str | None = None) -> ResumeError:
        return ResumeError(f"{path} is damaged ({reason}); {remedy or self._remedy}")

    def _clear(self) -> None:
        """Remove the folder, ``state.json`` last: if this is interrupted, the next run finds out what is left."""
        sync(self.folder.parent)  # has the name of the checkpoint, which a killed process may have left unflushed
        paths = [path for path in self.folder.iterdir() if path != self._manifest]
        for path in (*paths, self._manifest):
            if path.name == _UNFINISHED:
                shutil.rmtree(path, ignore_errors=True)
            elif self._belongs(path):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()

    @contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Give the errors of a write a remedy."""
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise ResumeError(
                f"writing {self.folder / name} failed: {error}. The progress stored before is valid: free disk space "
                "and run the same command again"
            ) from error


def read_data(path: Path, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Those of the tensors ``keys`` that a data file has, or all tensors; and its notes.

    Raises:
        ResumeError: if it cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if not keys or name in keys]  # noqa: SIM118
            # Copies: the alignment of a tensor in the file may change the last bit of its products.
            tensors = {name: file.get_tensor(name).clone() for name in names}
            return tensors, json.loads(file.metadata()["grasp"])
    except (OSError, RuntimeError, SafetensorError) as error:  # PyTorch opens the file, and raises RuntimeError
        raise ResumeError(f"reading {path} failed: {error}. Run the same command again to resume") from error


def _file_digest(path: Path, expected: str = "a file of the run") -> str:
    """The SHA-256 of a file, in hexadecimal; errors as ``open_regular``."""
    digest = hashlib.sha256()
    with open_regular(path, expected, ResumeError) as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _state_digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()
