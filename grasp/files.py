"""Writes files and folders whole or not at all, and computes digests of tensors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import sys
import uuid
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from grasp.errors import CheckpointError, GraspError, OccupiedError

if TYPE_CHECKING:
    from torch import Tensor

_SPARE_BYTES = 64 * 2**20  # for configuration, file headers, an ONNX graph, and a tokenizer, which has up to 40 MB
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux: relative to the current directory; let both names change places


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors (names, shapes, dtypes and bytes), in hexadecimal."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def expanded(path: str | Path) -> Path:
    """The path with the home folder in place of ``~`` and ``~user``; unchanged if there is no such user, as in shells.

    Example:
        >>> expanded("~nobody-of-this-name/model")
        PosixPath('~nobody-of-this-name/model')
    """
    return Path(os.path.expanduser(path))


Contents = Mapping[str, tuple[int, int, int]]


def contents(path: Path) -> Contents:
    """Inode, size and time of change of a file, or of everything in a folder, by relative path; empty if missing."""
    found = {item: item.lstat() for item in ([path] if os.path.isfile(path) else path.rglob("*"))}
    return {str(item.relative_to(path)): (stat.st_ino, stat.st_size, stat.st_mtime_ns) for item, stat in found.items()}


def try_writing(target: Path) -> None:
    """Write one block beside ``target``, under the name of its temporary, and remove it again.

    A missing folder is not created; the block is then written into its nearest parent that exists.

    Raises:
        OSError: if the folder is not writable, the disk is full, or the name is too long.
    """
    temporary = nearest_folder(target) / _temporary_name(target)
    try:
        temporary.write_bytes(bytes(4096))
        sync(temporary)
    finally:
        _remove(temporary)


def require_writable(target: Path, *, parents: bool = False) -> None:
    """Check, before long work, that ``write_whole`` can write a file. Nothing is changed.

    Args:
        target: the file; it may be missing.
        parents: whether its folder may be missing.

    Raises:
        GraspError: if it is a folder or a device, its folder is missing, or ``try_writing`` fails.
    """
    folder = target.absolute().parent
    if os.path.lexists(target) and not target.is_file():
        raise GraspError(f"output {target} is not a file; give the name of a file")
    if not parents and not folder.is_dir():
        raise GraspError(f"output {target} cannot be written: there is no folder {folder}; create it first")
    try:
        try_writing(target.absolute())
    except OSError as error:
        raise GraspError(f"output {target} cannot be written: {error}; give another one") from error


def require_space(target: Path, needed: int) -> None:
    """Check that the disk of ``target``, which may be missing, has ``needed`` free bytes and a reserve.

    Raises:
        CheckpointError: if it has not.
    """
    folder = nearest_folder(target)
    free = shutil.disk_usage(folder).free
    if free < needed + _SPARE_BYTES:
        raise CheckpointError(
            f"writing needs {(needed + _SPARE_BYTES) / 1e9:.2f} GB, {free / 1e9:.2f} GB are free on the disk of "
            f"{folder}; free some space, or give a folder on another disk"
        )


def write_whole(target: Path, content: str | bytes, *, seen: Contents | None = None) -> None:
    """Write a file in one step, with its missing parents: it is complete, or as it was. It survives a loss of power.

    Raises:
        GraspError: if it cannot be written; as ``replacing`` with ``seen``.
    """
    try:
        with replacing(target, seen=seen) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise GraspError(f"writing {target} failed, it is as it was before or complete: {error}") from error


@contextmanager
def replacing(target: Path, *, scratch: Path | None = None, seen: Contents | None = None) -> Iterator[Path]:
    """Yield a path for a new file or folder, which replaces ``target`` in one step when the block succeeds.

    Missing parents of ``target`` are created. Everything is flushed to the disk before and after the step. If the
    block raises, nothing changes. If the process is killed, the temporary remains: see ``in_use``. A folder that
    replaces one first gets a free name such as ``TARGET-2``. Then the two swap names, on Linux in one step. The former
    one is removed at the end.

    Args:
        target: the file or folder to replace; it may be missing.
        scratch: an existing folder on the same disk for the temporary; ``None`` for the folder of ``target``.
        seen: the ``contents`` of ``target`` when it was checked. Only they are replaced. ``None`` replaces any file.

    Raises:
        OccupiedError: if ``target`` has other contents than ``seen``. Both stay; the message has the new one's name.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    temporary = (scratch or target.parent) / _temporary_name(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            sync(path)
        if seen is None:
            os.replace(temporary, target)
        else:
            _place(temporary, target, seen)
        for folder in (target.parent, *(parent.parent for parent in missing)):
            sync(folder)
    except BaseException:
        _remove(temporary)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


def _place(new: Path, target: Path, seen: Contents) -> None:
    """Move ``new`` to ``target``, whose contents must be ``seen``."""
    try:
        if not seen or not os.path.lexists(target):
            _move(new, target)
        elif contents(target) != seen:
            raise FileExistsError
        elif new.is_dir():
            _replace_folder(new, target, seen)
        else:
            os.replace(new, target)
    except FileExistsError as error:
        kept = _move_aside(new, target)
        sync(target.parent)
        raise OccupiedError(
            f"{target} was changed by somebody else in the meantime and is left as it is; the new result is {kept}"
        ) from error


def _replace_folder(new: Path, target: Path, seen: Contents) -> None:
    """Replace a folder by another one. Of the former one only what was ``seen`` is removed."""
    beside = _move_aside(new, target)  # a name that no clean-up removes: it is soon the name of the former one
    swapped = False
    try:
        _swap(beside, target)
        swapped = True
        if contents(beside) != seen:
            raise FileExistsError
        sync(target.parent)
    except BaseException:
        with suppress(OSError):
            if swapped:
                _swap(beside, target)
            beside.rename(new)
        raise
    for name in sorted(seen, reverse=True):  # what is in a folder comes before the folder
        path = beside / name
        with suppress(OSError):
            path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    with suppress(OSError):
        beside.rmdir()


def _swap(one: Path, two: Path) -> None:
    """Let two folders swap their names: on Linux in one step, so that there is a folder of each name at any instant."""
    if sys.platform == "linux":
        renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
        paths = (_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(two))
        if renameat2 is not None and renameat2(*paths, _RENAME_EXCHANGE) == 0:
            return
    spare = _move_aside(two, two)
    try:
        _move(one, two)
    except BaseException:
        with suppress(OSError):
            _move(spare, two)
        raise
    spare.rename(one)


def _move(new: Path, target: Path) -> None:
    """Rename a file or folder, and replace nothing but an empty folder.

    Raises:
        FileExistsError: if there is something.
    """
    if new.is_dir():
        try:
            new.rename(target)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.ENOTDIR):
                raise FileExistsError from error
            raise
        return
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a disk without hard links
        if os.path.lexists(target):
            raise FileExistsError from None
        new.rename(target)
    else:
        _remove(new)


def _move_aside(path: Path, target: Path) -> Path:
    """Move a file or folder to the first free name beside ``target``, such as NAME-2, and return it."""
    stem, suffix = (target.name, "") if path.is_dir() else (target.stem, target.suffix)
    for number in count(2):
        aside = target.with_name(f"{stem}-{number}{suffix}")
        if not os.path.lexists(aside):
            with suppress(FileExistsError):
                _move(path, aside)
                return aside
    raise AssertionError


def nearest_folder(path: Path) -> Path:
    """The nearest parent of ``path`` that exists."""
    return next(parent for parent in path.parents if parent.exists())


def _temporary_name(target: Path) -> str:
    return f".{target.name}.{uuid.uuid4().hex[:8]}.partial"


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno == errno.EINVAL):  # some network disks cannot flush folders
            raise
    finally:
        os.close(descriptor)


@contextmanager
def in_use(folder: Path) -> Iterator[None]:
    """Keep other processes from taking a temporary folder for one that a killed process left."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a disk without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def remove_abandoned(target: Path) -> None:
    """Remove the temporaries that a killed process left beside ``target``, but none that is ``in_use``."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.????????.partial"):
        if not _is_locked(path):
            _remove(path)


def _is_locked(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return isinstance(error, BlockingIOError)
    finally:
        os.close(descriptor)
    return False


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
