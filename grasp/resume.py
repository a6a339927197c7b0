"""What a compression has done so far, kept in a folder: the same request after a kill goes on from there."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from grasp.architecture import Target, replace_module_
from grasp.calibration import CalibrationBatch
from grasp.checkpoint import require_space
from grasp.errors import ResumeError
from grasp.identity import differences, request_identity, tensors_digest
from grasp.modules import LowRankLinear
from grasp.offload import execution_device
from grasp.progress import Clock, Notify, unheard
from grasp.redundancy import Redundancy
from grasp.report import ModuleReport

if TYPE_CHECKING:  # it imports this module
    from grasp.config import GraspConfig

FORMAT = 2  # of the folder
INTERVAL = 30.0  # seconds: the sums of a running sweep are not written more often than this,
SHARE = 0.05  # nor so often that writing takes more than this fraction of the time
_UNFINISHED = "unfinished"  # the folder in which files are written, by safetensors under names of its own
_OWN_FILES = re.compile(rf"lock|state\.json|(module|sums)-.+\.safetensors|{_UNFINISHED}")


class Sum(Protocol):
    """A statistic that grows call by call."""

    tensor: Tensor
    calls: int


class NoState:
    """The state of a run that keeps nothing; what it does is what ``RunState`` is asked for."""

    redundancy: Redundancy | None = None  # where an earlier process measured it

    def begin(
        self, model: PreTrainedModel, batches: Sequence[CalibrationBatch], config: GraspConfig, clock: Clock
    ) -> None:
        """Take up what was kept; ``clock`` goes on from the time that it took."""

    def keep_redundancy(self, redundancy: Redundancy) -> None:
        """Keep the scores of all layers."""

    def restore_(self, model: PreTrainedModel, sweeps: Sequence[Sequence[Target]]) -> dict[Target, ModuleReport]:
        """Put the low-rank linears that were kept into the model; the report of each, in the order of ``sweeps``."""
        return {}

    def keep_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Keep what has become of one target, with its low-rank linear if it was replaced."""

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to what was kept of it; the number of its batches that they hold."""
        return 0

    def keep_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Keep the sums of a sweep now and then, and at its end, when they hold ``done`` of ``batches`` batches."""


class RunState(NoState):
    """A folder that holds what a run of ``compress_`` has done: give it as ``state``.

    A context manager. While it is open, no other process may use the folder. When its block ends well the folder is
    removed, so save the compressed model inside the block; when it ends in an exception, or the process is killed at
    whatever instant, the folder stays, and the same call goes on from there. It then gives the same indices and
    weights, bit for bit, on the same machine with the same number of threads. A run that fails before its first sweep
    has anything to keep leaves nothing.

    The time of the report counts what the earlier processes kept, not what was lost with them. At the start the model's
    weights are hashed (SHA-256, of the order of a second per GB) to tell it from another.

    Args:
        folder: new, or as an earlier run left it.
        notify: called with one line where a run is continued or interrupted.
        rank: which of the processes that share the work this is. The first writes all but the sums of the others.
        processes: how many share the work; all see the same folder.

    Raises:
        ResumeError: on entering, if the folder is in use, is something else, or cannot be written; from ``compress_``
            if it belongs to another request (another model, text or configuration), is damaged, or cannot be written.
    """

    def __init__(self, folder: str | Path, *, notify: Notify = unheard, rank: int = 0, processes: int = 1) -> None:
        self.folder = Path(folder).expanduser().resolve()
        self._notify, self._rank, self._processes = notify, rank, processes
        self._lock = FileLock(self.folder / "lock")
        self._sums = self.folder / f"sums-{rank}-of-{processes}.safetensors"
        self._identity: dict[str, Any] | None = None
        self._clock = Clock()
        self._kept = False  # whether the folder has more than block influence, or had something before
        self._continued = False  # whether an earlier process has done something
        self._found: dict[str, dict[str, Any]] = {}  # file name → its notes, as that process left them
        self._sweeps: Sequence[Sequence[Target]] = ()
        self._written = self._cost = 0.0  # when sums were last written, and the seconds it took
        self._made: list[Path] = []  # folders that were not there before

    def __enter__(self) -> RunState:
        if self._rank:
            return self
        self._made = [folder for folder in (self.folder, *self.folder.parents) if not folder.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            foreign = sorted(path.name for path in self.folder.iterdir() if not _OWN_FILES.fullmatch(path.name))
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
        self._kept = (self.folder / "state.json").exists()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._rank:
            return
        had_scores = self.redundancy is not None and not isinstance(error, Exception)
        if (kind is None and self._identity is not None) or not (self._kept or had_scores):
            self._clear()
        elif kind is KeyboardInterrupt:
            self._notify(f"the same command continues this run; it is kept in {self.folder}")
        self._lock.release()
        for folder in self._made:
            with suppress(OSError):  # not empty
                folder.rmdir()

    @property
    def batch_size(self) -> int | None:
        """Sequences in a batch of the run that is to be continued; ``None`` where there is none."""
        path = self.folder / "state.json"
        return self._read_state(path)["identity"].get("batch size") if path.exists() else None

    def begin(
        self, model: PreTrainedModel, batches: Sequence[CalibrationBatch], config: GraspConfig, clock: Clock
    ) -> None:
        """Check that the folder belongs to this request, or make it so; the clock goes on from the time kept there.

        Raises:
            ResumeError: if it does not, or is damaged.
        """
        clock.enter("identity")
        self._clock = clock
        request = request_identity(model, batches, config)
        self._identity = {"format": FORMAT, "processes": self._processes, **request}
        path = self.folder / "state.json"
        if not path.exists():
            self._write_state()
            return
        kept = self._read_state(path)
        if changed := differences(self._identity, kept["identity"]):
            raise ResumeError(
                f"{self.folder} holds an unfinished run of another request: {changed}. Give the request that it was "
                "begun with to continue it, or delete that folder to start anew"
            )
        self.redundancy = None if kept["redundancy"] is None else Redundancy(**kept["redundancy"])
        files = sorted(self.folder.glob("*.safetensors"))
        self._found = {file.name: self._read(file, only_notes=True)[1] for file in files}
        self._continued = self.redundancy is not None or bool(files)
        times = [kept["seconds"], *(notes["seconds"] for notes in self._found.values())]
        clock.add(max(times, key=lambda seconds: sum(seconds.values())))

    def keep_redundancy(self, redundancy: Redundancy) -> None:
        """Keep the scores of all layers."""
        self.redundancy = redundancy
        self._write_state()

    def restore_(self, model: PreTrainedModel, sweeps: Sequence[Sequence[Target]]) -> dict[Target, ModuleReport]:
        """Put the low-rank linears that were kept into the model; the report of each, in the order of ``sweeps``.

        Raises:
            ResumeError: if one is damaged.
        """
        self._sweeps = sweeps
        done: dict[Target, ModuleReport] = {}
        for target in (target for members in sweeps for target in members):
            path = self._module_path(target.name)
            if path.name not in self._found:
                continue
            tensors, notes = self._read(path)
            if tensors:
                replace_module_(model, target.name, _low_rank(target, tensors))
            done[target] = ModuleReport(**{**notes["report"], "indices": tuple(notes["report"]["indices"])})
        if self._continued and not self._rank:
            finished = sum(all(target in done for target in members) for members in sweeps)
            self._notify(f"continuing: {finished} of {len(sweeps)} sweeps done")
        return done

    def keep_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Keep what has become of one target, with its low-rank linear if it was replaced.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            tensors = {} if report.reason else dict(model.get_submodule(report.name).named_parameters())
            self._write(self._module_path(report.name), tensors, {"report": dataclasses.asdict(report)})

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to what was kept of it; the number of its batches that they hold.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to keep them.
        """
        require_space(self._sums, sum(total.tensor.nbytes for total in sums.values()))
        self._written = time.monotonic()
        calls = self._found.get(self._sums.name, {}).get("calls", {})
        done = 0
        if all(target.name in calls for target in sums):
            tensors, notes = self._read(self._sums)
            done = notes["done"]
            for target, total in sums.items():
                tensor = tensors[target.name]
                if tensor.shape != total.tensor.shape or tensor.dtype != total.tensor.dtype or done > batches:
                    raise self._damaged(self._sums, f"{target.name} does not fit")
                total.tensor.copy_(tensor)
                total.calls = calls[target.name]
        members = next(members for members in self._sweeps if any(target in sums for target in members))
        if len(sums) < len(members) and done < batches:  # the others' replacements would change these
            raise self._damaged(self._sums, "it lacks the sums of a sweep that was complete")
        return done

    def keep_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Keep the sums of a sweep now and then, and at its end, when they hold ``done`` of ``batches`` batches.

        Raises:
            ResumeError: if they cannot be written.
        """
        start = time.monotonic()
        if done < batches and start - self._written < max(INTERVAL, self._cost / SHARE):
            return
        calls = {target.name: total.calls for target, total in sums.items()}
        tensors = {target.name: total.tensor for target, total in sums.items()}
        self._write(self._sums, tensors, {"done": done, "calls": calls})
        self._written = time.monotonic()
        self._cost = self._written - start

    def _module_path(self, name: str) -> Path:
        return self.folder / f"module-{name}.safetensors"

    def _write_state(self) -> None:
        if self._rank == 0:
            scores = None if self.redundancy is None else self.redundancy._asdict()
            kept = {"identity": self._identity, "redundancy": scores, "seconds": self._clock.seconds}
            with _replacing(self.folder / "state.json") as temporary:
                temporary.write_text(json.dumps(kept, indent=2), encoding="utf-8")

    def _write(self, path: Path, tensors: Mapping[str, Tensor], notes: Mapping[str, Any]) -> None:
        plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        notes = {**notes, "seconds": self._clock.seconds, "sha256": tensors_digest(sorted(plain.items()))}
        with _replacing(path) as temporary:
            save_file(plain, temporary, {"grasp": json.dumps(notes)})
        self._kept = True

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

    def _read_state(self, path: Path) -> dict[str, Any]:
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            return {
                "identity": dict(kept["identity"]),
                "redundancy": kept["redundancy"],
                "seconds": dict(kept["seconds"]),
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise self._damaged(path, str(error)) from error

    def _damaged(self, path: Path, why: str) -> ResumeError:
        return ResumeError(f"{path} is damaged ({why}); delete the folder {self.folder} to start anew")

    def _clear(self) -> None:
        for path in list(self.folder.iterdir()):
            if path.name == _UNFINISHED:
                shutil.rmtree(path, ignore_errors=True)
            elif _OWN_FILES.fullmatch(path.name):
                path.unlink(missing_ok=True)
        with suppress(OSError):
            self.folder.rmdir()


def _low_rank(target: Target, tensors: Mapping[str, Tensor]) -> LowRankLinear:
    """The low-rank linear whose parameters are ``tensors``, for the place of a dense one."""
    (n, rank), k = tensors["U"].shape, tensors["Vh"].shape[1]
    device, dtype = execution_device(target.module), target.module.weight.dtype
    module = LowRankLinear(k, n, rank, bias="bias" in tensors, device=device, dtype=dtype)
    module.load_state_dict(dict(tensors))
    return module.train(target.module.training)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
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
            f"writing {path} failed: {error}. What was kept before is whole: make room, and give the same command to "
            "continue"
        ) from error
