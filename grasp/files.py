"""Writes files and folders whole or not at all, and computes digests of tensors."""

from __future__ import annotations

import glob
import hashlib
import os
import shutil
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from grasp.errors import GraspError

if TYPE_CHECKING:
    from torch import Tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Return the SHA-256 of named tensors (names, shapes, dtypes and bytes), in hexadecimal."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        if tensor.numel():
            digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def write_whole(target: Path, content: str | bytes) -> None:
    """Write a file in one step: it is complete, or as it was.

    Raises:
        GraspError: if it cannot be written.
    """
    try:
        with replacing(target) as temporary:
            temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    except OSError as error:
        raise GraspError(f"writing {target} failed, nothing was changed: {error}") from error


@contextmanager
def replacing(target: Path, *, scratch: Path | None = None) -> Iterator[Path]:
    """Yield a path for a new file or folder, which replaces ``target`` in one step when the block succeeds.

    Missing parents of ``target`` are created. If the block raises, nothing changes. If the process is killed, the
    temporary remains: see ``remove_abandoned``.

    Args:
        target: the file or folder to replace; it may be missing.
        scratch: an existing folder on the same disk for the temporary; ``None`` for the folder of ``target``.
    """
    missing = [parent for parent in target.parents if not parent.exists()]
    temporary = (scratch or target.parent) / f".{target.name}.{uuid.uuid4().hex[:8]}.partial"
    replaced = temporary.with_suffix(".old")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if temporary.is_file():
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
        elif target.exists():  # a folder cannot be renamed to one that is not empty
            target.rename(replaced)
        os.replace(temporary, target)
    except BaseException:
        if replaced.exists():
            shutil.rmtree(replaced) if target.exists() else replaced.rename(target)
        _remove(temporary)
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise
    if replaced.exists():
        shutil.rmtree(replaced)


def remove_abandoned(target: Path) -> None:
    """Remove the temporaries that a killed process left beside ``target``."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.????????.partial"):
        _remove(path)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it exists and can be removed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
