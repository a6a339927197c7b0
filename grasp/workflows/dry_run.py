"""An estimate of what a compression takes, made without reading the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from grasp.bench.costs import costs_for, find_costs
from grasp.calibration import NAMED_TEXTS
from grasp.checkpoint.saving import check_directory
from grasp.compression.batch_size import largest_batch_size
from grasp.compression.budget import find_prices
from grasp.compression.device_speed import Rates
from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import Estimate, estimate
from grasp.compression.job import CompressionJob
from grasp.compression.layer_cost import Tracer
from grasp.compression.memory_budget import FREE_FRACTION, check_budgets
from grasp.config import GraspConfig
from grasp.environment import free_bytes
from grasp.loading import find_device, load_config
from grasp.progress import no_notify
from grasp.statistics.processes import Processes
from grasp.workflows.compress import check_costs, rates_for
from grasp.workflows.samples import Samples, read_for
from grasp_kernels.roofline import Card


@dataclass(frozen=True)
class DryRun:
    """The estimate of a compression."""

    model: str  # its name
    output: str  # the folder that the checkpoint would be written to
    samples: Samples  # the calibration sequences; their batch size is a number
    device: str  # where the compression would run: a device of this machine, or a card
    dtype: str  # of the model's weights
    sharded: bool  # whether the weights are spread over the processes
    estimate: Estimate  # sweeps, FLOPs and memory; of one process
    rates: Rates  # in FLOPs per second: measured on the device, or the peaks of the card
    seconds: float  # FLOPs over rates; about the time without loading and saving
    memory: int | None  # the budget of the device, in bytes above the loaded model; ``None``: no limit
    # the budget of CPU memory beside the device, in bytes; ``None``: no limit, or no such memory
    host_memory: int | None
    free_bytes: int | None  # free memory of the device now, before the model is loaded; ``None`` for a card

    @property
    def on_card(self) -> bool:
        """Whether the rates are those of a card."""
        return self.free_bytes is None

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as values that JSON can hold."""
        return {**asdict(self), "estimate": self.estimate.to_dict()}


def dry_run(
    name: str,
    output: Path,
    config: GraspConfig,
    samples: Samples,
    *,
    costs: str | None = None,
    dtype: str = "auto",
    device: str | None = None,
    memory: int | None = None,
    host_memory: int | None = None,
    processes: int = 1,
    sharded: bool = False,
) -> DryRun:
    """Estimate what ``grasp.workflows.compress.compress`` takes for the same arguments; nothing is written.

    Args:
        name: as for ``compress``, like ``output``, ``config``, ``samples``, ``dtype``, ``device`` and the budgets.
        costs: as for ``compress``. A card also gives the rates, in place of the device.
        processes: processes that would share the work.
        sharded: whether they would share the weights.

    Raises:
        GraspError, ValueError: as ``compress`` does for an output folder, a model, a text file, a device, a budget or
            a configuration that it refuses.
    """
    target = check_directory(output)
    if samples.source not in NAMED_TEXTS:
        read_for(samples, no_notify)  # raises if it is no text
    card = _card(config, costs, processes)
    place = find_device("cpu" if card else device)
    model_config, weights_dtype = load_config(name, dtype=dtype)
    job = CompressionJob(
        *(model_config, config, weights_dtype, place, samples.num_samples, samples.seq_len, processes, sharded),
        on_card=card is not None,
    )
    check_budgets(memory, host_memory, on_cpu=job.on_cpu)
    if costs is not None and config.target_latency is not None:
        _require_reachable(job, costs)
    free = None if card else free_bytes(place)
    if memory is None and free is not None:
        memory = _default_budget(job, samples, free)
    if host_memory is None and free is not None and not job.on_cpu:
        host_memory = int(FREE_FRACTION * free_bytes(torch.device("cpu")) / processes)
    result = _estimate(job, samples, memory, host_memory)
    rates = rates_for(job, result, card)
    return DryRun(
        model=name,
        output=str(target),
        samples=replace(samples, batch_size=result.batch_size),
        device=card.name if card else str(place),
        dtype=str(weights_dtype).removeprefix("torch."),
        sharded=sharded,
        estimate=result,
        rates=rates,
        seconds=sum(result.seconds(rates).values()),
        memory=memory,
        host_memory=host_memory,
        free_bytes=free,
    )


def _card(config: GraspConfig, costs: str | None, processes: int) -> Card | None:
    """The card that ``costs`` names, if any. Costs in a file need a latency, as in a compression."""
    found = None if costs is None else find_costs(costs)
    if isinstance(found, Card):
        return found
    check_costs(config, costs, Processes(size=processes))
    return None


def _default_budget(job: CompressionJob, samples: Samples, free: int) -> int:
    """``FREE_FRACTION`` of what the model leaves of a process's memory; at least as much as one sequence takes."""
    one = estimate(job, 1 if samples.batch_size == "auto" else samples.batch_size)
    share = free / (job.processes if job.on_cpu else 1)
    return max(int(FREE_FRACTION * (share - one.model_bytes)), one.least_memory)


def _estimate(job: CompressionJob, samples: Samples, memory: int | None, host_memory: int | None) -> Estimate:
    size = samples.batch_size
    if size == "auto":
        size = 1 if memory is None else largest_batch_size(job, memory).batch_size
    return estimate(job, size, memory=memory, host_memory=host_memory)


def _require_reachable(job: CompressionJob, costs: str) -> None:
    """Raise unless ``costs`` belong to the model and the latency can be reached, as ``compress_`` does."""
    tracer = Tracer(job.model_config, dtype=job.dtype, device=job.device, batch_size=1, seq_len=job.seq_len)
    table = costs_for(tracer.model, costs, job.config.form, job.config.storages)
    find_prices(job.config, tracer.model, eligible_targets(tracer.model)[0], table, may_remove=True)
