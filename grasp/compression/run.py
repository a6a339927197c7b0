"""One call of ``compress_``: its request, checked, and everything that its steps share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from grasp.checkpoint.fingerprint import request_fingerprint
from grasp.checkpoint.run_state import NoState
from grasp.compression.budget import Prices, Targets, dense_seconds, find_prices
from grasp.compression.eligible import ModulesLeft, check_layers, eligible_targets, require_positions
from grasp.compression.memory_budget import MemoryBudget
from grasp.config import GraspConfig
from grasp.method.cost_table import CostTable
from grasp.model.batch import CalibrationBatch, batches_digest
from grasp.model.offload import is_fetched_per_call
from grasp.model.size import Size, model_size
from grasp.model.targets import decoder
from grasp.progress import Clock, Progress
from grasp.statistics.hidden_states import Scratch
from grasp.statistics.processes import Processes
from grasp.statistics.redundancy import block_influence
from grasp.statistics.scores import Scores, gather_scores


@dataclass(frozen=True)
class Run:
    """The request of a compression, checked against the model, and what its steps share."""

    model: PreTrainedModel  # changed in place
    batches: Sequence[CalibrationBatch]
    # other ones, on which losses are measured; with a global budget they decide between candidates
    held_out: Sequence[CalibrationBatch]
    config: GraspConfig
    costs: CostTable | None  # of decoding, for a target latency
    dense_seconds: float  # the predicted time to decode a token before; 0 without ``costs``
    targets: Targets  # the linears that can be compressed, by layer
    left: ModulesLeft  # those that cannot be compressed, by layer, each with its reason
    prices: Prices  # the unit of the budget
    before: Size  # the size of the model before
    memory: MemoryBudget  # which layers are swept together
    scratch: Scratch  # where hidden states are kept
    clock: Clock  # counts the time of each step
    progress: Progress  # called as ``progress(step, done, total)``
    state: NoState  # the run folder, or a temporary one
    processes: Processes  # the processes that share the work
    # ``gather_scores``, or what a study puts in its place to reuse statistics
    gather: Callable[..., Scores] = gather_scores
    narrowed: bool = False  # whether MLPs of the model have lost channels


@torch.inference_mode(mode=False)
def start_run(
    model: PreTrainedModel,
    batches: Sequence[CalibrationBatch],
    config: GraspConfig,
    costs: CostTable | None,
    progress: Progress,
    state: NoState,
    processes: Processes,
    *,
    held_out: Sequence[CalibrationBatch] = (),
    memory: int | None = None,
    host_memory: int | None = None,
) -> Run:
    """Check a request before anything long is done, and open or resume its run folder; errors as ``compress_``."""
    clock = Clock()
    require_positions(model, [*batches, *held_out])
    layers = decoder(model).layers
    before = model_size(model)
    check_layers(config, len(layers))
    if config.bits is not None and any(map(is_fetched_per_call, model.modules())):
        raise ValueError(
            f"bits={config.bits} needs all weights in the memory of one device, but some are offloaded or sharded: "
            "leave bits out, and quantise the result with `grasp quantize`"
        )
    targets, left = eligible_targets(model)
    prices = find_prices(config, model, targets, costs, may_remove=bool(held_out))
    given = [*batches, *held_out]
    tokens = [(batch.num_tokens, batch.context) for batch in given]
    processes.require_same("the request", f"{config} {before} {tokens} {batches_digest(given)}")
    linears = [target for members in targets.values() for target in members]
    budget = MemoryBudget.of(
        model, batches, config, linears, memory=memory, host_memory=host_memory, processes=processes
    )
    with processes.fail_together():
        state.begin(lambda: request_fingerprint(model, batches, held_out, config, costs), costs, clock)
    # Without a run folder, all processes use the temporary one of the first.
    state.folder = Path(processes.from_first(str(state.folder) if processes.first else ""))
    return Run(
        model=model,
        batches=batches,
        held_out=held_out,
        config=config,
        costs=costs,
        dense_seconds=0.0 if costs is None else dense_seconds(costs, targets),
        targets=targets,
        left=left,
        prices=prices,
        before=before,
        memory=budget,
        scratch=Scratch(state.folder, budget.hidden_states),
        clock=clock,
        progress=progress,
        state=state,
        processes=processes,
    )


def find_block_influence(run: Run) -> Sequence[float]:
    """The block influence of every layer: measured, or as an interrupted run measured it."""
    run.clock.enter("block_influence")
    scores = run.state.block_influence
    if scores is None:
        scores = block_influence(run.model, run.batches, progress=run.progress, processes=run.processes)
        run.state.record({}, block_influence=scores)
    return scores
