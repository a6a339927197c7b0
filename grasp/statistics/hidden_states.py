"""Hidden states of all batches at one place of a model: in memory up to a number of bytes, beyond that in a file."""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from grasp.errors import ResumeError


class Scratch:
    """How many bytes of hidden states stay in memory, and the folder for the files that take the rest.

    The files have no names: nothing is left of them when the process ends, however it ends.

    Args:
        folder: exists; on a disk, since a file in memory would save nothing.
        memory: bytes of CPU memory; ``None`` for any number.

    Attributes:
        held: bytes in memory now.
    """

    def __init__(self, folder: Path | None = None, memory: int | None = None) -> None:
        self._folder, self._memory = folder, memory
        self.held = 0

    def takes(self, nbytes: int) -> bool:
        """Whether so many bytes more stay in memory; if so, they are counted."""
        fits = self._memory is None or self.held + nbytes <= self._memory
        self.held += nbytes if fits else 0
        return fits

    def gives_back(self, counts: list[int]) -> None:
        """Count bytes that were taken as free."""
        self.held -= sum(counts)

    def file(self) -> IO[bytes]:
        """A new file without a name."""
        try:
            return tempfile.TemporaryFile(dir=self._folder)
        except OSError as error:
            raise self._failed(error) from error

    def write(self, file: IO[bytes], tensor: Tensor) -> None:
        """Append the bytes of a CPU tensor to a file.

        Raises:
            ResumeError: if they cannot be written.
        """
        try:
            file.seek(0, 2)
            file.write(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
            file.flush()
        except OSError as error:
            raise self._failed(error) from error

    def _failed(self, error: OSError) -> ResumeError:
        return ResumeError(
            f"hidden states cannot be written to {self._folder or tempfile.gettempdir()}: {error}. Free disk space, or "
            "give more memory, and run the same command again"
        )


class HiddenStates(Sequence[Tensor]):
    """The hidden states of each batch, (B, L, H), or a gradient in them. Items are on the CPU.

    Memory and file are freed with the object.

    Args:
        scratch: where they are kept.

    Example:
        >>> states = HiddenStates(Scratch(memory=16))
        >>> for value in (1.0, 2.0):  # 16 bytes each: the second one goes to a file
        ...     states.append(torch.full((1, 2, 2), value))
        >>> states[1].sum()
        tensor(8.)
    """

    def __init__(self, scratch: Scratch) -> None:
        self._scratch = scratch
        self._items: list[Tensor | tuple[int, torch.Size, torch.dtype]] = []  # in memory, or where it is in the file
        self._file: IO[bytes] | None = None
        self._size = 0  # bytes of the file
        self._counts: list[int] = []
        weakref.finalize(self, scratch.gives_back, self._counts)

    def append(self, tensor: Tensor) -> None:
        """Copy the states of the next batch.

        Raises:
            ResumeError: if there is no room for them on the disk.
        """
        tensor = tensor.detach()
        if self._scratch.takes(tensor.nbytes):
            self._counts.append(tensor.nbytes)
            self._items.append(tensor.to("cpu", copy=True))
            return
        if self._file is None:
            self._file = self._scratch.file()
        self._scratch.write(self._file, tensor.cpu())
        self._items.append((self._size, tensor.shape, tensor.dtype))
        self._size += tensor.nbytes

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        item = self._items[index]
        if isinstance(item, Tensor):
            return item
        assert self._file is not None
        offset, shape, dtype = item
        tensor = torch.empty(shape, dtype=dtype)  # aligned as the tensor that was written
        data = tensor.flatten().view(torch.uint8).numpy().data
        self._file.seek(offset)
        if self._file.readinto(data) < tensor.nbytes:  # type: ignore[attr-defined]
            raise ResumeError("a file of hidden states is shorter than what was written to it; run the command again")
        return tensor
