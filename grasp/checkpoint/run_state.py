"""The run folder of ``compress_``: an interrupted compression resumes from it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
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

    FORMAT = 5
    FILES = r"(module-.+|cut(\..+)?)\.safetensors|costs\.json"  # formats before 5: no digests, and a costs.json
    CACHES = r"sums-.+\.safetensors"

    def __init__(self, folder: str | Path, *, notify: Notify = no_notify, rank: int = 0, processes: int = 1) -> None:
        super().__init__(folder, notify=notify, rank=rank, processes=processes)
        self._sums = f"sums-{rank}-of-{processes}"
        self._costs: dict[str, Any] | None = None
        self._continued = False  # whether an earlier process has stored work
        self._sweeps: Sequence[Sequence[Target]] = ()

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

    def begin(
        self,
        model: PreTrainedModel,
        batches: Sequence[CalibrationBatch],
        config: GraspConfig,
        costs: CostTable | None,
        clock: Clock,
    ) -> None:
        """Open the run: write the fingerprint of a new one, or verify the stored one.

        Raises:
            ResumeError: if it has another fingerprint, or a file is missing or damaged.
        """
        clock.enter("identity")
        self._config, self._costs = config, None if costs is None else costs.to_dict()
        state = self._begin(request_fingerprint(model, batches, config, costs), clock)
        if not state:
            self._write_state()
            return
        self.block_influence = state["block_influence"]
        if state["decision"] is not None:
            removed, losses = state["decision"]
            self.decision = Decision(tuple(removed), losses)
        self._continued = self.block_influence is not None or any(self._stored_sums())

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
        """
        self._sweeps = sweeps
        reports: dict[Target, ModuleReport] = {}
        for target in (target for sweep in sweeps for target in sweep):
            file = self._files.get(_module_stem(target.name))
            if file is None:
                continue
            tensors, notes = self._read(file)
            if tensors:
                model.set_submodule(target.name, _low_rank(target, tensors))
            reports[target] = ModuleReport.from_dict(notes["report"])
        if self._continued and not self._rank:
            finished = [self.decision is not None or all(target in reports for target in sweep) for sweep in sweeps]
            if self._config.schedule == "progressive":  # the first cut has a sweep of its own
                finished.append(self.decision is not None or "cut" in self._files)
            self._notify(f"resuming: {sum(finished)} of {len(finished)} sweeps done")
        return reports

    def store_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        """Store the report of one linear, and its low-rank form if it was replaced.

        Raises:
            ResumeError: if it cannot be written.
        """
        if self._rank == 0:
            self._store_module(model, report)
            self._write_state()

    def store_decision(self, model: PreTrainedModel, decision: Decision, reports: Sequence[ModuleReport]) -> None:
        """Store the reports of all linears of a global budget. Part of them, after a kill, counts as none.

        Raises:
            ResumeError: if it cannot be written.
        """
        self.decision = decision
        if self._rank == 0:
            for report in reports:
                self._store_module(model, report)
            self._list("cut", None)
            self._write_state()

    def restore_cut(self, members: Sequence[Target]) -> dict[Target, SVD] | None:
        """The stored groups of the first cut of a progressive schedule, or ``None``.

        Raises:
            CheckpointError: if there is too little space to store them.
        """
        if "cut" not in self._files:
            weights = [target.module.weight for target in members]
            # At most: the cut in fp32 (fp64 for fp64), and the decided factors in the dtype of the model.
            needed = sum(w.numel() * (max(4, w.element_size()) + w.element_size()) for w in weights)
            require_space(self.folder / "cut.safetensors", needed)
            return None
        tensors, _ = self._read(self._files["cut"])
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
            self._list("cut", self._store("cut", tensors, {}))
            self._write_state()

    def restore_sums(self, sums: Mapping[Target, Sum], batches: int) -> int:
        """Set the sums of a sweep to the stored ones; the number of batches that they hold.

        Raises:
            ResumeError: if they are damaged; or missing, though linears of the sweep were replaced by them.
            CheckpointError: if there is too little space to store them.
        """
        require_space(self.folder, sum(total.tensor.nbytes for total in sums.values()))
        self._last_write = time.monotonic()
        members = next(sweep for sweep in self._sweeps if any(target in sums for target in sweep))
        is_used = len(sums) < len(members)  # the linears that were replaced would change these sums
        done = 0
        for path in self._stored_sums():
            self._verify(path, "" if is_used else "delete this file to repeat its sweep")
            tensors, notes = self._read(path.name)
            if notes["run"] == self._run and notes["done"] > done and all(t.name in notes["calls"] for t in sums):
                done = notes["done"]
                for target, total in sums.items():
                    total.tensor.copy_(tensors[target.name])
                    total.calls = notes["calls"][target.name]
        if is_used and done < batches:
            raise self._damaged(self.folder / self._sums, "it lacks the sums of a sweep that was used in part")
        return done

    def store_sums(self, sums: Mapping[Target, Sum], done: int, batches: int) -> None:
        """Store the sums of a sweep, which hold ``done`` of ``batches`` batches: twice a minute, and at its end.

        Raises:
            ResumeError: if they cannot be written.
        """
        if done < batches and not self._write_is_due():
            return
        notes = {"run": self._run, "done": done, "calls": {target.name: total.calls for target, total in sums.items()}}
        previous = self._stored_sums()
        with self._timed_write():
            name = self._store(self._sums, {target.name: total.tensor for target, total in sums.items()}, notes)
            for path in previous:
                if path.name != name:
                    path.unlink()
            self._write_state()  # has the time so far

    @property
    def _run(self) -> str:
        """A digest of the fingerprint and the rank, to which sums belong."""
        return hashlib.sha256(json.dumps([self._fingerprint, self._rank]).encode()).hexdigest()

    def _stored_sums(self) -> list[Path]:
        """The sums of this rank: one file, or two after a kill."""
        return sorted(self.folder.glob(f"{self._sums}.*"))

    def _store_module(self, model: PreTrainedModel, report: ModuleReport) -> None:
        stem = _module_stem(report.name)
        tensors = {} if report.reason else dict(model.get_submodule(report.name).named_parameters())
        self._list(stem, self._store(stem, tensors, {"report": dataclasses.asdict(report)}))

    def _state(self) -> dict[str, Any]:
        return {"costs": self._costs, "block_influence": self.block_influence, "decision": self.decision}


def _module_stem(name: str) -> str:
    return f"module-{name}"


def _low_rank(target: Target, tensors: Mapping[str, Tensor]) -> LowRankLinear:
    """The low-rank linear with the parameters ``tensors``, to take the place of a dense one."""
    (n, rank), k = tensors["U"].shape, tensors["Vh"].shape[1]
    device, dtype = execution_device(target.module), target.module.weight.dtype
    module = LowRankLinear(k, n, rank, bias="bias" in tensors, device=device, dtype=dtype)
    module.load_state_dict(dict(tensors))
    return module.train(target.module.training)
