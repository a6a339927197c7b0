"""Records which ops a run calls, with which shapes, and how often.

A process whose environment names a folder in ``GRASP_RECORD`` records from the import of this package on. The ops'
implementations call ``record``, so a call of a compiled graph counts whenever it runs, and tracing counts nothing. A
CUDA graph calls no implementation when it is replayed: its calls count once, as captured.

Each process writes files of its own into the folder. The counts are memory that is mapped from such a file, so that
they survive the process however it ends.
"""

from __future__ import annotations

import json
import mmap
import os
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from .quantized import KINDS, columns_per_scale
from .reference import Factors
from .shapes import GroupShape, LinearShape

VARIABLE = "GRASP_RECORD"
_SLOTS = 4096  # different calls in a file; more of them go to a further file
_COUNT_BYTES = 8  # of the int64 counts at the start of a file; a line of JSON for each of them follows


class RecordedCall(NamedTuple):
    """The properties of a call that its time depends on most."""

    op: str
    shape: GroupShape  # on a GPU with the padded ranks that kernels read
    pivoted: tuple[bool, ...]  # of each linear
    rows: int
    dtype: str
    device: str  # type, such as "cuda"
    captured: bool  # into a CUDA graph, which runs later, any number of times
    weights: tuple[str, ...] = ()  # of each linear "int8", "int4/64", ..., or "" if it is floating; () if all are


class Recorder:
    """Counts the calls of this process in files of a folder."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.renew()

    def renew(self) -> None:
        """Go on with a new file: also a process that was forked, whose counts start at 0."""
        self._lock = threading.Lock()
        self._slots: dict[RecordedCall, int] = {}
        self._file: BinaryIO | None = None
        self._counts: memoryview[int]

    def count(self, call: RecordedCall) -> None:
        """Count one call.

        Raises:
            OSError: if a file cannot be written.
        """
        with self._lock:
            slot = self._slots.get(call)
            if slot is None:
                slot = self._add(call)
            self._counts[slot] += 1

    def _add(self, call: RecordedCall) -> int:
        if self._file is None or len(self._slots) == _SLOTS:
            self._open()
        assert self._file is not None
        self._file.write(json.dumps(call).encode() + b"\n")
        return self._slots.setdefault(call, len(self._slots))

    def _open(self) -> None:
        descriptor, _ = tempfile.mkstemp(prefix=f"{os.getpid()}-", dir=self._folder)
        self._file = os.fdopen(descriptor, "r+b", buffering=0)
        self._file.write(bytes(_SLOTS * _COUNT_BYTES))  # on the disk, so that no write to the mapped memory can fail
        self._counts = memoryview(mmap.mmap(descriptor, _SLOTS * _COUNT_BYTES)).cast("q")
        self._slots = {}


recorders: list[Recorder] = []


def record(op: str, x: Tensor, factors: Sequence[Factors]) -> None:
    """Count a call in all ``recorders``, unless it has no rows. One that cannot write ends with a warning.

    A call is not counted if U and Vh of a linear are stored in different ways: no benchmark can repeat it.
    """
    if not x.numel():
        return
    weights = tuple(_stored(group, x.shape[-1]) for group in factors)
    if None in weights:
        text = "calls are not recorded where U and Vh are stored in different ways"
        warnings.warn(text, RuntimeWarning, stacklevel=2)
        return
    call = RecordedCall(
        "lowrank_linear" if op == "lowrank_linear_grouped" and len(factors) == 1 else op,
        tuple(LinearShape(x.shape[-1], group.out_features, group.Vh.shape[0]) for group in factors),
        tuple(group.order is not None for group in factors),
        x.numel() // x.shape[-1],
        str(x.dtype).removeprefix("torch."),
        x.device.type,
        x.is_cuda and torch.cuda.is_current_stream_capturing(),
        tuple(filter(None, weights)) and tuple(text or "" for text in weights),
    )
    for recorder in tuple(recorders):
        try:
            recorder.count(call)
        except OSError as error:
            with suppress(ValueError):  # another thread was first
                recorders.remove(recorder)
            warnings.warn(f"calls of {__package__} are no longer recorded: {error}", RuntimeWarning, stacklevel=2)


def _stored(group: Factors, depth: int) -> str | None:
    """How both factors are stored, ``""`` if they are floating; ``None`` if they are stored in different ways."""
    if not group.quantized:
        return ""
    size = columns_per_scale(group.Vh_scales, depth)
    alike = not len(group.U) or (
        group.U.dtype == group.Vh.dtype and columns_per_scale(group.U_scales, group.rank) in (0, size)
    )
    return f"{KINDS[group.Vh.dtype]}{f'/{size}' * bool(size)}" if alike and group.Vh.dtype in KINDS else None


@contextmanager
def recording_to(folder: Path) -> Iterator[None]:
    """Record the calls of all threads of this process, and of processes that it forks, while the block runs."""
    recorder = Recorder(folder)
    recorders.append(recorder)
    try:
        yield
    finally:
        with suppress(ValueError):  # it could not write
            recorders.remove(recorder)


def read_folder(folder: Path) -> tuple[int, Counter[RecordedCall]]:
    """The number of processes that recorded into a folder, and how often they made each call."""
    processes, calls = set(), Counter[RecordedCall]()
    for path in folder.iterdir():
        content = path.read_bytes()
        *lines, _ = content[_SLOTS * _COUNT_BYTES :].split(b"\n")  # a killed process leaves half a line
        counts = memoryview(content)[: len(lines) * _COUNT_BYTES].cast("q")
        for line, count in zip(lines, counts, strict=True):
            values = dict(zip(RecordedCall._fields, json.loads(line), strict=True))
            linears = tuple(LinearShape(*linear) for linear in values["shape"])
            of_each = {name: tuple(values[name]) for name in ("pivoted", "weights")}
            call = RecordedCall(**{**values, **of_each, "shape": linears})
            calls[call] += count
            processes.add(path.name.partition("-")[0])
    return len(processes), calls


def _renew_all() -> None:
    for recorder in recorders:
        recorder.renew()


os.register_at_fork(after_in_child=_renew_all)
if _folder := os.environ.get(VARIABLE):
    recorders.append(Recorder(Path(_folder)))
