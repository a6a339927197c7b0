"""The largest number of sequences in a forward pass that a device has room for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from accelerate.utils import find_executable_batch_size
from transformers import PreTrainedModel

from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import Estimate, Job, estimate
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.running import first_device
from grasp.model.targets import decoder
from grasp.statistics.sweep import capture_prefix, sweep

# Tokens in a forward pass on a CPU, by the bytes of a number: more were measured to be no faster, and 8192 to be slower
# (SmolLM2-135M, two cores): caches and fresh memory pages do not keep up with activations that large.
CPU_TOKENS = {8: 512, 4: 1024, 2: 2048}
_CGROUP = Path("/sys/fs/cgroup")


def fitting_batch_size(
    model: PreTrainedModel, config: GraspConfig, *, num_samples: int, seq_len: int, trial: bool = True
) -> int:
    """The largest batch size for ``compress_`` that the model's device has room for by now.

    It comes from an estimate. On a GPU that is put to the test with one batch, and lowered where memory does not
    suffice; on a CPU no error would tell, so the estimate stands.

    Args:
        model: as it will be given to ``compress_``.
        config: likewise.
        num_samples: calibration sequences.
        seq_len: tokens in each.
        trial: make the test. Not where processes share the weights: each would try another size, and wait for others.

    Raises:
        OutOfMemoryError: if the device has no room for one sequence.
        ValueError, CalibrationError, UnsupportedModelError: as ``estimate`` does.
    """
    device = first_device(model)
    job = Job(model.config, config, model.dtype, device, num_samples, seq_len)
    plan = largest_batch_size(job, free_bytes(device))
    if device.type == "cpu" or not trial:
        return plan.batch_size
    return executable_batch_size(plan.batch_size, lambda size: try_batch(model, config, plan, seq_len, size))


def largest_batch_size(job: Job, free: int, *, loaded: bool = True) -> Estimate:
    """The estimate with the largest power of two that fits into ``free`` bytes, or with 1 if none does.

    On a CPU it has no more than ``CPU_TOKENS`` tokens, or one sequence. Errors are those of ``estimate``.

    Args:
        job: what to estimate.
        free: bytes that the device has left.
        loaded: whether the model has already taken its part.
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


def free_bytes(device: torch.device) -> int:
    """Memory that a device has left: for a CPU what the system, or the container, can give without swapping."""
    if device.type == "cpu":
        return min([psutil.virtual_memory().available, *_cgroup_free()])
    return int(torch.accelerator.get_memory_info(device)[0])


def _cgroup_free() -> list[int]:
    """What a container's control group has left, its file cache counted as free; empty where there is no limit."""
    try:
        limit = (_CGROUP / "memory.max").read_text().strip()
        used = int((_CGROUP / "memory.current").read_text())
        facts = dict(line.split() for line in (_CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return []
    return [] if limit == "max" else [int(limit) - used + int(facts.get("inactive_file", 0))]


def executable_batch_size(largest: int, trial: Callable[[int], None]) -> int:
    """The largest batch size, from ``largest`` down, with which ``trial`` does not run out of memory.

    Raises:
        OutOfMemoryError: if it does so even with 1.
    """

    def attempt(batch_size: int) -> int:
        try:
            trial(batch_size)
        except torch.OutOfMemoryError as error:
            if batch_size > 1:
                raise
            raise OutOfMemoryError(
                "the device has too little memory for a batch of one sequence; take shorter sequences, "
                "--dtype bfloat16, or --device cpu"
            ) from error
        return batch_size

    found: int = find_executable_batch_size(attempt, starting_batch_size=largest)()
    return found


def try_batch(model: PreTrainedModel, config: GraspConfig, plan: Estimate, seq_len: int, batch_size: int) -> None:
    """Run one batch through the dearest sweep that there can be, with room taken for what it sums up; nothing is kept.

    Raises:
        torch.OutOfMemoryError: if the device's memory does not suffice.
    """
    device = first_device(model)
    targets, _ = eligible_targets(model)
    lowest = min(config.layers) if config.layers else 0
    members = [target for layer in range(lowest, len(decoder(model).layers)) for target in targets[layer]]
    batch = CalibrationBatch(torch.zeros(batch_size, seq_len, dtype=torch.int64))
    dearest = plan_sweeps(members, config.schedule)[-1]
    sums = torch.empty(plan.memory.statistics, dtype=torch.uint8, device=device)
    prefix = capture_prefix(model, [batch], [min(target.layer for target in dearest)], dtype=config.sweep_dtype)
    sweep(model, [batch], dearest, prefix, lambda call: None, dtype=config.sweep_dtype)
    del sums
