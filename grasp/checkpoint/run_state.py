"""The run folder of ``compress_``: an interrupted compression resumes from it."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from safetensors.torch import save_file
from torch import Tensor

from grasp.checkpoint import run_folder
from grasp.checkpoint.run_folder import RunFolder, read_data
from grasp.files import require_space
from grasp.method.cost_table import CostTable
from grasp.model.targets import Target
from grasp.progress import Clock, Notify, no_notify
from grasp.statistics.gradients import GradientSum, PartialSums

if TYPE_CHECKING:
    from typing_extensions import Self  # typing has it from Python 3.11 on


class Decision(NamedTuple):
    """The decision about all linears, and the candidates that it was made between."""

    removed: tuple[int, ...]  # the layers to remove, ascending
    ranks: Mapping[str, int]  # path of each linear that was scored and stays → its rank, ``DENSE`` or ``ROUNDED``
    losses: Mapping[str, float]  # candidate → its loss on the held-out batches, in nats per token
    bytes: Mapping[str, int]  # candidate → bytes of all weights
    seconds: Mapping[str, float]  # candidate → predicted time per token; {} without costs
    map: str = ""  # file of the linear map that takes the place of the removed layers, if one does
    fitted: bool = False  # whether left factors are fitted
    whole: bool = False  # whether MLPs that have lost channels get them back


class NoState(PartialSums):
    """The interface of ``RunState``. It keeps files in a temporary folder, until its ``with`` block ends.

    A data file is written under a stem, such as ``module-PATH``. It belongs to the run once it is listed.

    Attributes:
        block_influence: of all layers, as an interrupted run measured it.
        widths: path → channels before and after, of the MLPs that lose some; ``None`` before they are chosen.
        cut: path → rank of the linears that the first cut of a progressive schedule has replaced; ``None`` before it.
        measured: what was measured to choose between candidates: name → JSON values.
        decision: of a global budget.
        files: stem → name of a file that belongs to the run.
    """

    block_influence: Sequence[float] | None = None
    widths: Mapping[str, Sequence[int]] | None = None
    cut: Mapping[str, int] | None = None
    measured: Mapping[str, Any] = MappingProxyType({})
    decision: Decision | None = None

    def __init__(self) -> None:
        self.files: dict[str, str] = {}
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    @cached_property
    def folder(self) -> Path:
        """The folder of the files."""
        self._temporary = tempfile.TemporaryDirectory(prefix="grasp-")
        return Path(self._temporary.name)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._temporary is not None:
            self._temporary.cleanup()

    def begin(self, fingerprint: Callable[[], Mapping[str, Any]], costs: CostTable | None, clock: Clock) -> None:
        """Open the run, and add the time that it has taken so far to ``clock``; here ``fingerprint`` is not called."""

    def note_progress(self, text: str) -> None:
        """Say how much of the run an interrupted process has done."""

    def write(self, stem: str, tensors: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> str:
        """Write a data file; its name."""
        name = f"{stem}.safetensors"
        on_cpu = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(on_cpu, self.folder / name, {"grasp": json.dumps(notes)})
        return name

    def read(self, name: str, *keys: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Those of the tensors ``keys`` that a data file has, or all of them; and its notes."""
        return read_data(self.folder / name, *keys)

    def once(self, name: str, measure: Callable[[], Any]) -> Any:
        """What ``measure`` returns, as JSON values; from then on it is stored under its name in ``measured``."""
        if name not in self.measured:
            self.record({}, measured={**self.measured, name: measure()})
        return self.measured[name]

    def record(self, files: Mapping[str, str | None], *, soon: bool = False, **values: Any) -> None:
        """List files under their stems, ``None`` for a file that is no longer needed, and set attributes of the run.

        Args:
            files: stem → name of the file.
            soon: a process that is killed now may lose this; not more than half a minute of it.
            values: of ``block_influence``, ``widths``, ``cut``, ``measured`` or ``decision``.
        """
        for stem, name in files.items():
            if name is None and stem in self.files:
                (self.folder / self.files.pop(stem)).unlink(missing_ok=True)
            elif name is not None:
                self.files[stem] = name
        vars(self).update(values)


class RunState(RunFolder, NoState):
    """The run folder of ``compress_``, passed as ``state``; a context manager.

    The folder is locked while it is open. It is removed when the ``with`` block ends normally, so save the compressed
    model inside the block. It stays after an exception or a kill, and the same call then resumes. It ends with the same
    indices and weights, bit for bit, on the same machine with the same number of threads. A run that fails before its
    first sweep has stored anything leaves no folder.

    The times in the report count the stored work of earlier processes, but not the work that was lost with them. At the
    start the weights of the model are hashed (SHA-256, about a second per GB).

    Args:
        folder: a new folder, or the folder of an interrupted run.
        notify: called with one line of text when a run resumes or is interrupted.
        rank: rank of this process. Rank 0 writes everything but the sums of the other processes.
        processes: number of processes that share the work. All use the same folder.

    Raises:
        ResumeError: on entering, if another process uses the folder, it contains other files, or it is not writable;
            from ``compress_``, if the folder belongs to a run with another model, text or configuration, or is damaged.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as scratch, RunState(f"{scratch}/out.partial") as state:
        ...     pass  # report = compress_(model, batches, config, state=state); model.save_pretrained(...)
    """

    FORMAT = 12
    FILES = r"(module|narrow|cut|first|second|only|map)(-.+|\..+)?\.safetensors|costs\.json"  # this before format 5
    CACHES = r"sums-.+\.safetensors"

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        super().__init__(folder, notify=notify, rank=rank, processes=processes)
        self._sums = f"sums-{rank}-of-{processes}"
        self._costs: dict[str, Any] | None = None
        self._continued = False  # whether an earlier process has stored work
        self._listed = 0.0  # time of the last state.json

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        return self._has_progress or (self.block_influence is not None and not isinstance(error, Exception))

    @property
    def batch_size(self) -> int | None:
        """The number of sequences in a batch of the interrupted run; ``None`` if there is none.

        Raises:
            ResumeError: if ``state.json`` is damaged.
        """
        return self._stored_state().get("identity", {}).get("batch size")

    @property
    def costs(self) -> CostTable | None:
        """The costs of decoding of the interrupted run; ``None`` if there are none.

        Raises:
            ResumeError: if ``state.json`` is damaged.
        """
        costs = self._stored_state().get("costs")
        return None if costs is None else CostTable.from_dict(costs)

    def begin(self, fingerprint: Callable[[], Mapping[str, Any]], costs: CostTable | None, clock: Clock) -> None:
        """Open the run: write the fingerprint of a new one, or verify the stored one.

        Raises:
            ResumeError: if it has another fingerprint, or a file is missing or damaged.
        """
        clock.enter("identity")
        self._costs = None if costs is None else costs.to_dict()
        state = self.open_run(fingerprint(), clock)
        if not state:
            return
        for name in ("block_influence", "widths", "cut", "measured"):
            setattr(self, name, state[name])
        if state["decision"] is not None:
            removed, *rest = state["decision"]
            self.decision = Decision(tuple(removed), *rest)
        self._continued = self.block_influence is not None or any(self._stored_sums())

    def note_progress(self, text: str) -> None:
        """Say how much of the run an interrupted process has done, if one has stored anything."""
        if self._continued and not self._rank:
            self._notify(text)

    def record(self, files: Mapping[str, str | None], *, soon: bool = False, **values: Any) -> None:
        """List files in ``state.json``, and set attributes of the run, see ``NoState``. Rank 0 writes.

        Raises:
            ResumeError: if it cannot be written.
        """
        for stem, name in files.items():
            self._list(stem, name)
        vars(self).update(values)
        if not soon or time.monotonic() - self._listed >= run_folder.INTERVAL:
            self._write_state()
            self._listed = time.monotonic()

    def restore_sums(self, sums: Mapping[Target, GradientSum]) -> int:
        """Set the sums of a sweep to the stored ones; the number of batches that they hold.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to store them.
        """
        require_space(self.folder, sum(total.tensor.nbytes for total in sums.values()))
        self._last_write = time.monotonic()
        done = 0
        for path in self._stored_sums():
            self._verify(path, "delete this file to repeat its sweep")
            tensors, notes = self.read(path.name)
            if notes["run"] == self.run and notes["done"] > done and all(t.name in notes["calls"] for t in sums):
                done = notes["done"]
                for target, total in sums.items():
                    total.tensor.copy_(tensors[target.name])
                    total.calls = notes["calls"][target.name]
        return done

    def store_sums(self, sums: Mapping[Target, GradientSum], done: int, batches: int) -> None:
        """Store the sums of a sweep, which hold ``done`` of ``batches`` batches: twice a minute, and at its end.

        Raises:
            ResumeError: if they cannot be written.
        """
        if done < batches and not self._write_is_due():
            return
        notes = {"run": self.run, "done": done, "calls": {target.name: total.calls for target, total in sums.items()}}
        previous = self._stored_sums()
        with self._timed_write():
            name = self.write(self._sums, {target.name: total.tensor for target, total in sums.items()}, notes)
            for path in previous:
                if path.name != name:
                    path.unlink()
            self._write_state()  # has the time so far

    def _stored_sums(self) -> list[Path]:
        """The sums of this rank: one file, or two after a kill."""
        return sorted(self.folder.glob(f"{self._sums}.*"))

    def _state(self) -> dict[str, Any]:
        return {
            "costs": self._costs,
            "block_influence": self.block_influence,
            "widths": self.widths,
            "cut": self.cut,
            "measured": dict(self.measured),
            "decision": self.decision,
        }
