"""What a compression would take, without reading the weights."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

from grasp.compression.batch_size import free_bytes, largest_batch_size
from grasp.compression.device_speed import Rates, measure_rates
from grasp.compression.estimate import Estimate, Job, estimate
from grasp.config import GraspConfig
from grasp.loading import find_device, load_config
from grasp.workflows.samples import Samples


@dataclass(frozen=True)
class Plan:
    """What a compression would do and take.

    Attributes:
        model: its name.
        samples: with a number as batch size.
        device: where it would run.
        dtype: of the model's weights.
        estimate: sweeps, FLOPs and memory.
        rates: measured on the device, in FLOPs per second.
        seconds: FLOPs over rates; about the time without loading and saving.
        free_bytes: what the device has left now, the model not being loaded.
    """

    model: str
    samples: Samples
    device: str
    dtype: str
    estimate: Estimate
    rates: Rates
    seconds: float
    free_bytes: int

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON can hold it."""
        return {**asdict(self), "estimate": self.estimate.to_dict()}


def plan(name: str, config: GraspConfig, samples: Samples, *, dtype: str = "auto", device: str | None = None) -> Plan:
    """Estimate what ``compress`` would take, without reading the model's weights.

    Raises:
        GraspError, ValueError: as ``load_config``, ``estimate`` and ``find_device`` do.
    """
    place = find_device(device)
    model_config, weights_dtype = load_config(name, dtype=dtype)
    job = Job(model_config, config, weights_dtype, place, samples.num_samples, samples.seq_len)
    free = free_bytes(place)
    if samples.batch_size == "auto":
        made = largest_batch_size(job, free, loaded=False)
    else:
        made = estimate(job, samples.batch_size)
    tokens = made.batch_size * samples.seq_len
    rates = measure_rates(made.largest_matrix, tokens, dtype=job.sweep_dtype, device=place)
    return Plan(
        model=name,
        samples=replace(samples, batch_size=made.batch_size),
        device=str(place),
        dtype=str(weights_dtype).removeprefix("torch."),
        estimate=made,
        rates=rates,
        seconds=made.seconds(rates),
        free_bytes=free,
    )
