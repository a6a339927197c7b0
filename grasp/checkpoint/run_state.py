"""The run folder of ``compress_``: an interrupted compression resumes from it."""

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
from grasp.model.targets import Target
from grasp.progress import Clock, Notify, no_notify
from grasp.statistics.partial_sums import PartialSums, Sum

if TYPE_CHECKING:
    from grasp.config import GraspConfig


FORMAT = 4  # version of the run folder


class Decision(NamedTuple):
    """The decision about all linears of a global budget."""

    removed: tuple[int, ...]  # the layers to remove, ascending
    losses: Mapping[str, float]  # candidate → its loss on the held-out batches, in nats per token


class NoState(PartialSums):
    """The interface of ``RunState``; it stores nothing."""

    block_influence: Sequence[float] | None = None  # of all layers, as an interrupted run measured it
    decision: Decision | None = None  # of an interrupted run

    def begin(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        costs: CostTable | None,
        clock: Clock,
    ) -> None:
        """Open the run, and add the time that it has taken so far to ``clock``."""

    def store_block_influence(self, scores: Sequence[float]) -> None:
        """Store the block influence of all layers."""

    def restore_(self, model: PreTrainedModel, sweeps: Sequence[Sequence[Target]]) -> dict[Target, ModuleReport]:
        """Put the stored low-rank linears into the model; their reports, in the order of ``sweeps``."""
        return {}

    def store_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Store the report of one linear, and its low-rank form if it was replaced."""

    def store_decision(self, model: PreTrainedModel, decision: Decision, reports: Sequence[ModuleReport]) -> None:
        """Store the reports of all linears of a global budget together."""

    def restore_cut(self, members: Sequence[Target]) -> dict[Target, SVD] | None:
        """The stored groups of the first cut of a progressive schedule, or ``None``."""
        return None

    def store_cut(self, cut: Mapping[Target, SVD]) -> None:
        """Store the groups of the first cut of a progressive schedule."""


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

    FILES = r"((module|sums)-.+|cut)\.safetensors|costs\.json"

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        super().__init__(folder, notify=notify, rank=rank, processes=processes)
        self._sums = self.folder / f"sums-{rank}-of-{processes}.safetensors"
        self._cut = self.folder / "cut.safetensors"
        self._costs = self.folder / "costs.json"
        self._continued = False  # whether an earlier process has stored work
        self._notes: dict[str, dict[str, Any]] = {}  # name of a stored file → its notes
        self._sweeps: Sequence[Sequence[Target]] = ()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        return self._has_progress or (self.block_influence is not None and not isinstance(error, Exception))

    @property
    def batch_size(self) -> int | None:
        """The number of sequences in a batch of the interrupted run; ``None`` if there is none."""
        path = self.folder / "state.json"
        return self._read_state()["identity"].get("batch size") if path.exists() else None

    @property
    def costs(self) -> CostTable | None:
        """The costs of decoding of the interrupted run; ``None`` if there are none.

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
        """Open the run: write the fingerprint of a new one, or check that the stored one is the same.

        Raises:
            ResumeError: if it is another one, or the folder is damaged.
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
        stored = self._read_state()
        self._require_same(stored["identity"])
        self.block_influence = stored["block_influence"]
        if stored["decision"] is not None:
            removed, losses = stored["decision"]
            self.decision = Decision(tuple(removed), losses)
        files = sorted(self.folder.glob("*.safetensors"))
        if config.decides_together and self.decision is None:
            files = [file for file in files if not file.name.startswith("module-")]
        self._notes = {file.name: self._read(file, only_notes=True)[1] for file in files}
        self._continued = self.block_influence is not None or bool(files)
        times = [stored["seconds"], *(notes["seconds"] for notes in self._notes.values())]
        clock.add(max(times, key=lambda seconds: sum(seconds.values())))

    def store_block_influence(self, scores: Sequence[float]) -> None:
        """Store the block influence of all layers.

        Raises:
            ResumeError: if they cannot be written.
        """
        self.block_influence = scores
        self._write_state()

    def restore_(self, model: PreTrainedModel, sweeps: Sequence[Sequence[Target]]) -> dict[Target, ModuleReport]:
        """Put the stored low-rank linears into the model.

        Returns:
            The report of each stored linear, replaced or not, in the order of ``sweeps``.

        Raises:
            ResumeError: if a file is damaged.
        """
        self._sweeps = sweeps
        reports: dict[Target, ModuleReport] = {}
        for target in (target for sweep in sweeps for target in sweep):
            path = self._module_path(target.name)
            if path.name not in self._notes:
                continue
            tensors, notes = self._read(path)
            if tensors:
                model.set_submodule(target.name, _low_rank(target, tensors))
            reports[target] = ModuleReport.from_dict(notes["report"])
        if self._continued and not self._rank:
            finished = [self.decision is not None or all(target in reports for target in sweep) for sweep in sweeps]
            if self._config.schedule == "progressive":  # the first cut has a sweep of its own
                finished.append(self.decision is not None or self._cut.name in self._notes)
            self._notify(f"resuming: {sum(finished)} of {len(finished)} sweeps done")
        return reports

    def store_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Store the report of one linear, and its low-rank form if it was replaced.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            tensors = {} if report.reason else dict(model.get_submodule(report.name).named_parameters())
            self._write(self._module_path(report.name), tensors, {"report": dataclasses.asdict(report)})

    def store_decision(self, model: PreTrainedModel, decision: Decision, reports: Sequence[ModuleReport]) -> None:
        """Store the reports of all linears of a global budget. Part of them, after a kill, counts as none.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            for path in self.folder.glob("module-*"):  # of a process that was killed before it had stored all
                path.unlink()
        for report in reports:
            self.store_module(model, report)
        self.decision = decision
        self._write_state()
        if self._rank == 0:
            self._cut.unlink(missing_ok=True)

    def restore_cut(self, members: Sequence[Target]) -> dict[Target, SVD] | None:
        """The stored groups of the first cut of a progressive schedule, or ``None``.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to store them.
        """
        if self._cut.name not in self._notes:
            weights = [target.module.weight for target in members]
            # At most: the cut in fp32 (fp64 for fp64), and the decided factors in the dtype of the model.
            require_space(self._cut, sum(w.numel() * (max(4, w.element_size()) + w.element_size()) for w in weights))
            return None
        tensors, _ = self._read(self._cut)
        cut = (target for target in members if f"{target.name}.S" in tensors)
        # Copies: the alignment of a tensor in the file may change the last bit of its products.
        return {t: SVD(*(tensors[f"{t.name}.{name}"].clone() for name in SVD._fields)) for t in cut}

    def store_cut(self, cut: Mapping[Target, SVD]) -> None:
        """Store the groups of the first cut of a progressive schedule.

        Raises:
            ResumeError: if they cannot be written.
        """
        if self._rank == 0:
            tensors = {f"{t.name}.{name}": tensor for t, svd in cut.items() for name, tensor in svd._asdict().items()}
            self._write(self._cut, tensors, {})

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to the stored ones; the number of batches that they hold.

        Raises:
            ResumeError: if they are damaged.
            CheckpointError: if there is too little space to store them.
        """
        require_space(self._sums, sum(total.tensor.nbytes for total in sums.values()))
        self._last_write = time.monotonic()
        calls = self._notes.get(self._sums.name, {}).get("calls", {})
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
        members = next(sweep for sweep in self._sweeps if any(target in sums for target in sweep))
        if len(sums) < len(members) and done < batches:  # the linears that were replaced would change these sums
            raise self._damaged(self._sums, "it lacks the sums of a complete sweep")
        return done

    def store_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Store the sums of a sweep, which hold ``done`` of ``batches`` batches: twice a minute, and at its end.

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
            scores = self.block_influence
            state = {"identity": self._fingerprint, "block_influence": scores, "decision": self.decision}
            self._write_json(state | {"seconds": self._clock.seconds})

    def _read_state(self) -> dict[str, Any]:
        state = self._read_json()
        try:
            return {
                "identity": dict(state["identity"]),
                "block_influence": state.get("block_influence"),  # formats before 4 do not have it
                "decision": state.get("decision"),
                "seconds": dict(state["seconds"]),
            }
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self.folder / "state.json", str(error)) from error


def _low_rank(target: Target, tensors: Mapping[str, Tensor]) -> LowRankLinear:
    """The low-rank linear with the parameters ``tensors``, to take the place of a dense one."""
    (n, rank), k = tensors["U"].shape, tensors["Vh"].shape[1]
    device, dtype = execution_device(target.module), target.module.weight.dtype
    module = LowRankLinear(k, n, rank, bias="bias" in tensors, device=device, dtype=dtype)
    module.load_state_dict(dict(tensors))
    return module.train(target.module.training)
