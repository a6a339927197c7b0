"""An estimate of what a compression takes, made without reading the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from grasp.bench.costs import costs_for
from grasp.checkpoint.saving import check_directory
from grasp.compression.batch_size import largest_batch_size
from grasp.compression.budget import find_prices
from grasp.compression.device_speed import Rates, measure_rates
from grasp.compression.eligible import eligible_targets
from grasp.compression.estimate import CompressionJob, Estimate, estimate
from grasp.compression.layer_cost import Tracer
from grasp.compression.memory import free_bytes
from grasp.config import GraspConfig
from grasp.loading import find_device, load_config
from grasp.workflows.compress import check_costs
from grasp.workflows.samples import Samples


@dataclass(frozen=True)
class DryRun:
    """The estimate of a compression.

    Attributes:
        model: its name.
        output: the folder that the checkpoint would be written to.
        samples: the calibration sequences; their batch size is a number.
        device: where the compression would run.
        dtype: of the model's weights.
        estimate: sweeps, FLOPs and memory.
        rates: measured on the device, in FLOPs per second.
        seconds: FLOPs over rates; about the time without loading and saving.
        free_bytes: free memory of the device now, before the model is loaded.
    """

    model: str
    output: str
    samples: Samples
    device: str
    dtype: str
    estimate: Estimate
    rates: Rates
    seconds: float
    free_bytes: int

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
) -> DryRun:
    """Estimate what ``grasp.workflows.compress.compress`` takes for the same arguments; nothing is written.

    Raises:
        GraspError, ValueError: as ``compress`` does for an output folder, a model, a device or a configuration that it
            refuses.
    """
    target = check_directory(output)
    check_costs(config, costs)
    place = find_device(device)
    model_config, weights_dtype = load_config(name, dtype=dtype)
    job = CompressionJob(model_config, config, weights_dtype, place, samples.num_samples, samples.seq_len)
    if costs is not None:
        _require_reachable(job, costs)
    free = free_bytes(place)
    if samples.batch_size == "auto":
        result = largest_batch_size(job, free, loaded=False)
    else:
        result = estimate(job, samples.batch_size)
    tokens = result.batch_size * samples.seq_len
    rates = measure_rates(result.largest_matrix, tokens, dtype=job.sweep_dtype, device=place)
    return DryRun(
        model=name,
        output=str(target),
        samples=replace(samples, batch_size=result.batch_size),
        device=str(place),
        dtype=str(weights_dtype).removeprefix("torch."),
        estimate=result,
        rates=rates,
        seconds=result.seconds(rates),
        free_bytes=free,
    )


def _require_reachable(job: CompressionJob, costs: str) -> None:
    """Raise unless ``costs`` belong to the model and the latency can be reached, as ``compress_`` does."""
    tracer = Tracer(job.model_config, dtype=job.dtype, device=job.device, batch_size=1, seq_len=job.seq_len)
    table = costs_for(tracer.model, costs)
    find_prices(job.config, tracer.model, eligible_targets(tracer.model)[0], table)
