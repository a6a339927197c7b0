"""The largest batch size that fits into the memory of a device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import CompressionJob, Estimate, estimate
from grasp.compression.memory import free_bytes
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.running import first_device
from grasp.model.targets import decoder
from grasp.statistics.sweep import capture_prefix, sweep

# Most tokens per forward pass on a CPU, by bytes per number. More tokens were not faster, and 8192 were slower
# (SmolLM2-135M, two cores), because of cache misses and page faults.
CPU_TOKENS = {8: 512, 4: 1024, 2: 2048}


def fitting_batch_size(
    model: PreTrainedModel, config: GraspConfig, *, num_samples: int, seq_len: int, trial: bool = True
) -> int:
    """The largest batch size for ``compress_`` that fits into the free memory of the device of the model.

    The batch size comes from an estimate. On a GPU it is tested with one batch, and reduced if memory runs out. A CPU
    does not report an error, so the estimate is used as it is.

    Args:
        model: the model for ``compress_``.
        config: its configuration.
        num_samples: calibration sequences.
        seq_len: tokens per sequence.
        trial: test the estimate on a GPU. Set it to false if the weights are sharded: the processes would test
            different sizes and wait for each other.

    Raises:
        OutOfMemoryError: if one sequence does not fit.
        ValueError, CalibrationError, UnsupportedModelError: as ``estimate`` does.
    """
    device = first_device(model)
    job = CompressionJob(model.config, config, model.dtype, device, num_samples, seq_len)
    plan = largest_batch_size(job, free_bytes(device))
    if device.type == "cpu" or not trial:
        return plan.batch_size
    return executable_batch_size(plan.batch_size, lambda size: try_batch(model, config, plan, seq_len, size))


def largest_batch_size(job: CompressionJob, free: int, *, loaded: bool = True) -> Estimate:
    """The estimate with the largest power of two as batch size that fits into ``free`` bytes; at least 1.

    A batch on a CPU has at most ``CPU_TOKENS`` tokens, or one sequence. Errors are those of ``estimate``.

    Args:
        job: the compression.
        free: free bytes of the device.
        loaded: whether the model is already in memory.
    """
    most = job.num_samples
    if job.device.type == "cpu":
        most = min(most, max(1, CPU_TOKENS[job.sweep_dtype.itemsize] // job.seq_len))
    fitting = estimate(job)
    while (size := 2 * fitting.batch_size) <= most:
        larger = estimate(job, size)
        if larger.memory.peak + (0 if loaded else larger.model_bytes) > free:
            break
        fitting = larger
    return fitting


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

    batch_size: int = find_executable_batch_size(attempt, starting_batch_size=largest)()
    return batch_size


def try_batch(model: PreTrainedModel, config: GraspConfig, plan: Estimate, seq_len: int, batch_size: int) -> None:
    """Run one batch through the sweep that needs the most memory, with the memory of its sums allocated.

    Raises:
        torch.OutOfMemoryError: if the device has too little memory.
    """
    device = first_device(model)
    targets, _ = eligible_targets(model)
    lowest = min(config.layers) if config.layers else 0
    members = [target for layer in range(lowest, len(decoder(model).layers)) for target in targets[layer]]
    batch = CalibrationBatch(torch.zeros(batch_size, seq_len, dtype=torch.int64))
    largest = plan_sweeps(members, config.schedule)[-1]
    sums = torch.empty(plan.memory.statistics, dtype=torch.uint8, device=device)
    prefix = capture_prefix(model, [batch], [min(target.layer for target in largest)], dtype=config.sweep_dtype)
    sweep(prefix, largest, lambda call: None)
    del sums
