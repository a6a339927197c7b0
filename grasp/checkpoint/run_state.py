"""What a compression has done so far, kept in a folder: the same request after a kill goes on from there."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from transformers import PreTrainedModel

from grasp.checkpoint.compression_report import ModuleReport
from grasp.checkpoint.fingerprint import request_fingerprint
from grasp.checkpoint.run_folder import RunFolder
from grasp.checkpoint.saving import require_space
from grasp.method.cost_table import CostTable
from grasp.method.svd import SVD
from grasp.model.batch import CalibrationBatch
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.offload import execution_device
from grasp.model.targets import Target, replace_module_
from grasp.progress import Clock, Notify, no_notify
from grasp.statistics.partial_sums import PartialSums, Sum
from grasp.statistics.redundancy import Redundancy

if TYPE_CHECKING:
    from grasp.config import GraspConfig


FORMAT = 4  # of the folder


class Decision(NamedTuple):
    """What was decided for all linears together."""

    removed: tuple[int, ...]  # layers
    losses: Mapping[str, float]  # by candidate, on the held-out batches


class NoState(PartialSums):
    """The state of a run that keeps nothing; what it does is what ``RunState`` is asked for."""

    redundancy: Redundancy | None = None  # where an earlier process measured it
    decision: Decision | None = None  # where an earlier process came to one

    def begin(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        costs: CostTable | None,
        clock: Clock,
    ) -> None:
        """Take up what was kept; ``clock`` goes on from the time that it took."""

    def keep_redundancy(self, redundancy: Redundancy) -> None:
        """Keep the scores of all layers."""

    def restore_(self, model: PreTrainedModel, sweeps: Sequence[Sequence[Target]]) -> dict[Target, ModuleReport]:
        """Put the low-rank linears that were kept into the model; the report of each, in the order of ``sweeps``."""
        return {}

    def keep_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Keep what has become of one target, with its low-rank linear if it was replaced."""

    def keep_decision(self, model: PreTrainedModel, decision: Decision, reports: Sequence[ModuleReport]) -> None:
        """Keep what has become of all targets together."""

    def restore_cut(self, members: Sequence[Target]) -> dict[Target, SVD] | None:
        """The groups of a progressive schedule's first cut, where an earlier process made it."""
        return None

    def keep_cut(self, cut: Mapping[Target, SVD]) -> None:
        """Keep the groups of a progressive schedule's first cut."""


class RunState(RunFolder, NoState):
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

    FILES = r"((module|sums)-.+|cut)\.safetensors|costs\.json"

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        super().__init__(folder, notify=notify, rank=rank, processes=processes)
        self._sums = self.folder / f"sums-{rank}-of-{processes}.safetensors"
        self._cut = self.folder / "cut.safetensors"
        self._costs = self.folder / "costs.json"
        self._continued = False  # whether an earlier process has done something
        self._found: dict[str, dict[str, Any]] = {}  # file name → its notes, as that process left them
        self._sweeps: Sequence[Sequence[Target]] = ()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        return self._has_progress or (self.redundancy is not None and not isinstance(error, Exception))

    @property
    def batch_size(self) -> int | None:
        """Sequences in a batch of the run that is to be continued; ``None`` where there is none."""
        path = self.folder / "state.json"
        return self._read_state()["identity"].get("batch size") if path.exists() else None

    @property
    def costs(self) -> CostTable | None:
        """The costs of decoding that the run to be continued was given; ``None`` where there are none.

        Raises:
            CostTableError: if they are damaged.
        """
        return CostTable.load(self._costs) if self._costs.exists() else None

    def begin(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        costs: CostTable | None,
        clock: Clock,
    ) -> None:
        """Check that the folder belongs to this request, or make it so; the clock goes on from the time kept there.

        Raises:
            ResumeError: if it does not, or is damaged.
        """
        clock.enter("identity")
        self._clock, self._config = clock, config
        request = request_fingerprint(model, batches, config, costs)
        self._fingerprint = {"format": FORMAT, "processes": self._processes, **request}
        path = self.folder / "state.json"
        if not path.exists():
            if costs is not None and self._rank == 0:
                with self._replacing(self._costs) as temporary:
                    costs.save(temporary)
            self._write_state()
            return
        kept = self._read_state()
        self._require_same(kept["identity"])
        self.redundancy = None if kept["redundancy"] is None else Redundancy(**kept["redundancy"])
        if kept["decision"] is not None:
            removed, losses = kept["decision"]
            self.decision = Decision(tuple(removed), losses)
        files = sorted(self.folder.glob("*.safetensors"))
        if config.decides_together and self.decision is None:
            files = [file for file in files if not file.name.startswith("module-")]
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
            done[target] = ModuleReport.from_dict(notes["report"])
        if self._continued and not self._rank:
            finished = [self.decision is not None or all(t in done for t in members) for members in sweeps]
            if self._config.schedule == "progressive":  # the sweep that its first cut rests on comes before
                finished.append(self.decision is not None or self._cut.name in self._found)
            self._notify(f"continuing: {sum(finished)} of {len(finished)} sweeps done")
        return done

    def keep_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Keep what has become of one target, with its low-rank linear if it was replaced.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            tensors = {} if report.reason else dict(model.get_submodule(report.name).named_parameters())
            self._write(self._module_path(report.name), tensors, {"report": dataclasses.asdict(report)})

    def keep_decision(self, model: PreTrainedModel, decision: Decision, reports: Sequence[ModuleReport]) -> None:
        """Keep what has become of all targets together: a part of it does not count.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            for path in self.folder.glob("module-*"):  # of an earlier process, killed before all were kept
                path.unlink()
        for report in reports:
            self.keep_module(model, report)
        self.decision = decision
        self._write_state()
        if self._rank == 0:
            self._cut.unlink(missing_ok=True)

    def restore_cut(self, members: Sequence[Target]) -> dict[Target, SVD] | None:
        """The groups of a progressive schedule's first cut, where an earlier process made it.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to keep them.
        """
        if self._cut.name not in self._found:
            weights = [target.module.weight for target in members]
            # At most: the cut in fp32 (fp64 for fp64), and what is decided in the model's own dtype.
            require_space(self._cut, sum(w.numel() * (max(4, w.element_size()) + w.element_size()) for w in weights))
            return None
        tensors, _ = self._read(self._cut)
        found = (target for target in members if f"{target.name}.S" in tensors)
        # Copies, since what is read lies in the file as it comes, and products may depend on that in the last bit.
        return {t: SVD(*(tensors[f"{t.name}.{name}"].clone() for name in SVD._fields)) for t in found}

    def keep_cut(self, cut: Mapping[Target, SVD]) -> None:
        """Keep the groups of a progressive schedule's first cut.

        Raises:
            ResumeError: if they cannot be written.
        """
        if self._rank == 0:
            tensors = {f"{t.name}.{name}": each for t, svd in cut.items() for name, each in svd._asdict().items()}
            self._write(self._cut, tensors, {})

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to what was kept of it; the number of its batches that they hold.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to keep them.
        """
        require_space(self._sums, sum(total.tensor.nbytes for total in sums.values()))
        self._last_write = time.monotonic()
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
        if done < batches and not self._write_is_due():
            return
        calls = {target.name: total.calls for target, total in sums.items()}
        tensors = {target.name: total.tensor for target, total in sums.items()}
        with self._timed_write():
            self._write(self._sums, tensors, {"done": done, "calls": calls})

    def _module_path(self, name: str) -> Path:
        return self.folder / f"module-{name}.safetensors"

    def _write_state(self) -> None:
        if self._rank == 0:
            scores = None if self.redundancy is None else self.redundancy._asdict()
            kept = {"identity": self._fingerprint, "redundancy": scores, "decision": self.decision}
            self._write_json(kept | {"seconds": self._clock.seconds})

    def _read_state(self) -> dict[str, Any]:
        kept = self._read_json()
        try:
            return {
                "identity": dict(kept["identity"]),
                "redundancy": kept["redundancy"],
                "decision": kept.get("decision"),  # which those before format 3 do not have
                "seconds": dict(kept["seconds"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self.folder / "state.json", str(error)) from error


def _low_rank(target: Target, tensors: Mapping[str, Tensor]) -> LowRankLinear:
    """The low-rank linear whose parameters are ``tensors``, for the place of a dense one."""
    (n, rank), k = tensors["U"].shape, tensors["Vh"].shape[1]
    device, dtype = execution_device(target.module), target.module.weight.dtype
    module = LowRankLinear(k, n, rank, bias="bias" in tensors, device=device, dtype=dtype)
    module.load_state_dict(dict(tensors))
    return module.train(target.module.training)
