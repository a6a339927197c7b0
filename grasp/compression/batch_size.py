"""The largest batch size that fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import Estimate, estimate
from grasp.compression.job import CompressionJob
from grasp.compression.memory import statistics_bytes
from grasp.compression.memory_budget import FREE_FRACTION, MemoryBudget
from grasp.config import GraspConfig
from grasp.environment import free_bytes
from grasp.errors import OutOfMemoryError
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.offload import fetched_bytes
from grasp.model.running import first_device
from grasp.model.targets import decoder
from grasp.statistics.processes import ALONE, Processes
from grasp.statistics.sweep import capture_prefix, sweep

# Most tokens per forward pass on a CPU, by bytes per number. More tokens were not faster, and 8192 were slower
# (SmolLM2-135M, two cores), because of cache misses and page faults.
CPU_TOKENS = {8: 512, 4: 1024, 2: 2048}


def fitting_batch_size(
    model: PreTrainedModel, job: CompressionJob, *, memory: int | None = None, processes: Processes = ALONE
) -> int:
    """The largest batch size for ``compress_`` that fits into the free memory of the device of the model.

    The batch size comes from an estimate. On a GPU it is tested with one batch, and reduced if memory runs out. A CPU
    does not report an error, so the estimate is used as it is.

    Args:
        model: the model for ``compress_``.
        job: the compression, in one process.
        memory: the budget in bytes above the loaded model; ``None`` for ``FREE_FRACTION`` of the free memory.
        processes: that divide the free memory of a CPU. If they share the weights, nothing is tested: they would test
            different sizes and wait for each other.

    Raises:
        OutOfMemoryError: if one sequence does not fit.
        ValueError, CalibrationError, UnsupportedModelError: as ``estimate`` does.
    """
    share = FREE_FRACTION / (processes.size if job.on_cpu else 1)
    budget = int(share * free_bytes(job.device)) if memory is None else memory
    largest = largest_batch_size(job, budget).batch_size
    if job.on_cpu or processes.sharded:
        return largest
    return executable_batch_size(largest, lambda size: try_batch(model, job.config, budget, job.seq_len, size))


def largest_batch_size(job: CompressionJob, budget: int) -> Estimate:
    """The estimate with the largest power of two as batch size that fits into ``budget`` bytes above the loaded model.

    A batch on a CPU has at most ``CPU_TOKENS`` tokens, or one sequence. No batch is so large that a layer runs more
    often for lack of memory.

    Raises:
        OutOfMemoryError: if one sequence does not fit.
        ValueError, CalibrationError, UnsupportedModelError: as ``estimate`` does.
    """
    most = job.num_samples
    if job.on_cpu:
        most = min(most, max(1, CPU_TOKENS[job.sweep_dtype.itemsize] // job.seq_len))
    fitting = estimate(job, memory=budget)
    while (size := 2 * fitting.batch_size) <= most:
        try:
            larger = estimate(job, size, memory=budget)
        except OutOfMemoryError:
            break
        if _repetitions(larger) > _repetitions(fitting):
            break
        fitting = larger
    return fitting


def _repetitions(plan: Estimate) -> int:
    return sum(sweep.runs - sweep.spans for sweep in plan.sweeps)


def executable_batch_size(largest: int, trial: Callable[[int], None]) -> int:
    """The largest batch size, from ``largest`` down, for which ``trial`` does not run out of memory.

    Raises:
        OutOfMemoryError: if ``trial`` runs out of memory with 1.
    """

    def attempt(batch_size: int) -> int:
        try:
            trial(batch_size)
        except torch.OutOfMemoryError as error:
            if batch_size > 1:
                raise
            raise OutOfMemoryError(
                "the device has too little memory for a batch of one sequence; use shorter sequences, "
                "--dtype bfloat16, or --device cpu"
            ) from error
        return batch_size

    return find_executable_batch_size(attempt, starting_batch_size=largest)()


def try_batch(model: PreTrainedModel, config: GraspConfig, memory: int, seq_len: int, batch_size: int) -> None:
    """Run one batch through the deepest span of the largest sweep, with the memory of its sums allocated.

    Raises:
        torch.OutOfMemoryError: if the device has too little memory.
    """
    targets, _ = eligible_targets(model)
    lowest, depth = min(config.layers) if config.layers else 0, len(decoder(model).layers)
    members = [target for layer in range(lowest, depth) for target in targets[layer]]
    batch = CalibrationBatch(torch.zeros(batch_size, seq_len, dtype=torch.int64))
    largest = plan_sweeps(members, config.schedule)[-1]
    budget = MemoryBudget.of(model, [batch], config, largest, memory=memory, host_memory=None)
    span = budget.spans(largest, range(min(target.layer for target in largest), depth))[0]
    size = statistics_bytes(span.parts[0], config, batch.num_tokens, fetched=fetched_bytes(model) > 0)
    sums = torch.empty(size, dtype=torch.uint8, device=first_device(model))
    prefix = capture_prefix(model, [batch], [span.layers.start], dtype=config.sweep_dtype)
    sweep(prefix, span.parts[0], lambda call: None, layers=span.layers)
    del sums
