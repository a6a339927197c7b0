"""A compression to estimate."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from grasp.config import GraspConfig
from grasp.method.basis import BASES
from grasp.method.metrics import METRICS


@dataclass(frozen=True)
class CompressionJob:
    """A compression to estimate."""

    model_config: PreTrainedConfig  # configuration of the model; its weights are not needed
    # configuration of the compression. With ``threshold_ratio``, ranks are assumed to be at their upper bound, where
    # the low-rank linear has as many parameters as the dense one.
    config: GraspConfig
    dtype: torch.dtype  # dtype of the weights
    device: torch.device  # the device to run on, on which layers are traced
    num_samples: int  # calibration sequences
    seq_len: int  # tokens per sequence
    processes: int = 1  # processes that share the sequences and the decompositions
    sharded: bool = False  # whether the weights are spread over the processes
    on_card: bool = False  # whether a card that this machine does not have is meant, with CPU memory beside it

    @property
    def on_cpu(self) -> bool:
        """Whether the model is in CPU memory."""
        return self.device.type == "cpu" and not self.on_card

    @property
    def sweep_dtype(self) -> torch.dtype:
        """The dtype of the sweeps."""
        name = self.config.sweep_dtype
        return self.dtype if name is None else getattr(torch, name)

    @property
    def sum_bytes(self) -> int:
        """Bytes per number in a sum."""
        return max(4, self.dtype.itemsize)

    @property
    def local_tokens(self) -> int:
        """Calibration tokens of one process."""
        return -(-self.num_samples // self.processes) * self.seq_len

    @property
    def rounds(self) -> int:
        """How often all linears are scored."""
        return 2 if self.config.schedule == "progressive" else 1

    @property
    def has_moments(self) -> bool:
        """Whether the metric needs gradients."""
        return METRICS[self.config.metric].moment != "none"

    @property
    def passes_per_sweep(self) -> int:
        """How often a sweep runs over the calibration set: for covariances and for gradients, in each round."""
        return self.rounds * (BASES[self.config.basis].inputs + self.has_moments)
