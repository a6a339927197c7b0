"""Compress models, such as random Llamas, in processes of their own; measure the memory and the time that it takes."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from grasp.bench.memory import peak_bytes_above_now
from grasp.checkpoint.compression_report import CompressionReport
from grasp.checkpoint.run_state import RunState
from grasp.compress import compress_
from grasp.compression.job import CompressionJob
from grasp.config import GraspConfig
from grasp.progress import Progress, no_progress

PROBES = 4  # random vectors that every linear is applied to


class Job(Protocol):
    """A compression that another process can make and measure."""

    @property
    def config(self) -> GraspConfig:
        """What is measured."""

    def make(self) -> tuple[PreTrainedModel, list[Tensor]]:
        """The model, and its calibration batches."""


@dataclass(frozen=True)
class RandomLlama:
    """A random Llama and random tokens to compress it with; the default layers are those of Llama-3.1-8B."""

    layers: int
    sequences: int
    seq_len: int
    batch_size: int = 1
    hidden_size: int = 4096
    intermediate_size: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 1024
    dtype: str = "bfloat16"
    compression_ratio: float = 0.2

    @property
    def config(self) -> GraspConfig:
        """The preset that is measured."""
        return GraspConfig.best(compression_ratio=self.compression_ratio)

    @property
    def model_config(self) -> LlamaConfig:
        """The configuration of the model."""
        return LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=self.seq_len,
            bos_token_id=None,
            eos_token_id=None,
        )

    @property
    def estimated_job(self) -> CompressionJob:
        """The same compression for ``grasp.compression.estimate``."""
        dtype = getattr(torch, self.dtype)
        return CompressionJob(self.model_config, self.config, dtype, torch.device("cpu"), self.sequences, self.seq_len)

    def make(self) -> tuple[LlamaForCausalLM, list[Tensor]]:
        """The model, and its calibration batches.

        The rows and columns of each weight have different norms: the spectrum of a plain random matrix is so flat that
        no rank is better than another.
        """
        model = AutoModelForCausalLM.from_config(self.model_config, dtype=getattr(torch, self.dtype))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() < 2:
                    continue
                rows, columns = (torch.randn(size, generator=generator) for size in parameter.shape)
                parameter.normal_(std=1.0 if "embed" in name else parameter.shape[1] ** -0.5, generator=generator)
                if "layers" in name:
                    parameter.mul_((0.7 * columns).exp().to(parameter.dtype))
                    parameter.mul_((0.7 * rows).exp()[:, None].to(parameter.dtype))
        tokens = torch.randint(self.vocabulary, (self.sequences, self.seq_len), generator=generator)
        return model.eval(), list(tokens.split(self.batch_size))


WARM_UP = RandomLlama(layers=1, sequences=4, seq_len=64, hidden_size=128, intermediate_size=256, heads=4, kv_heads=2)


@dataclass(frozen=True)
class MeasuredRun:
    """A compression that ended."""

    peak_bytes: int  # largest resident set of the process above the one with the model loaded
    disk_bytes: int  # largest size of the run folder, looked at whenever a step reports progress
    seconds: float  # of the process on its processors, with all threads; without the making of the model
    wall_seconds: Mapping[str, float]  # by step
    ranks: Mapping[str, int]  # by linear; 0 for one that stays dense
    # by linear, its weight times ``PROBES`` random vectors, (N, PROBES); {} if layers were removed
    products: Mapping[str, npt.NDArray[np.float32]]


def measure(job: Job, folder: Path, *, memory: int | None = None, threads: int = 1, held_out: int = 0) -> MeasuredRun:
    """Compress a model in a new process.

    Args:
        job: the model, its tokens and the configuration.
        folder: a new folder for the progress of the run, which is removed at the end.
        memory: the budget, bytes above the loaded model; ``None`` for what is free.
        threads: of the process.
        held_out: so many of the batches, the last, decide between candidates.

    Raises:
        GraspError: as ``compress_`` does.
        BrokenProcessPool: if the process is killed, as for want of memory.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(_run, job, folder, memory, threads, held_out).result()


def _run(job: Job, folder: Path, memory: int | None, threads: int, held_out: int) -> MeasuredRun:
    torch.set_num_threads(threads)
    # First a small one, whose memory is that of libraries and their threads.
    _compress(*WARM_UP.make(), WARM_UP.config, folder.with_name(f"{folder.name}-small"), None)
    model, batches = job.make()
    reports, disk_bytes = [], [0]

    def look(step: str, done: int, total: int) -> None:
        disk_bytes.append(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()))

    def run() -> None:
        reports.append(_compress(model, batches, job.config, folder, memory, held_out, look))

    start = time.process_time()
    peak = peak_bytes_above_now(run)
    seconds = time.process_time() - start
    assert peak is not None, "measured on Linux"
    [report] = reports
    ranks = {module.name: module.rank for module in report.modules}
    return MeasuredRun(
        peak_bytes=peak,
        disk_bytes=max(disk_bytes),
        seconds=seconds,
        wall_seconds=dict(report.seconds),
        ranks=ranks,
        products={} if report.removed_layers else {name: _product(model.get_submodule(name)) for name in ranks},
    )


def _compress(
    model: PreTrainedModel,
    batches: list[Tensor],
    config: GraspConfig,
    folder: Path,
    memory: int | None,
    held_out: int = 0,
    progress: Progress = no_progress,
) -> CompressionReport:
    used, others = batches[: len(batches) - held_out], batches[len(batches) - held_out :]
    with RunState(folder) as state:
        return compress_(model, used, config, held_out=others, state=state, progress=progress, memory=memory)


@torch.no_grad()
def _product(linear: nn.Module) -> npt.NDArray[np.float32]:
    factors = [parameter for parameter in linear.parameters() if parameter.dim() == 2]  # the weight, or U and Vh
    product = torch.randn(factors[-1].shape[1], PROBES, generator=torch.Generator().manual_seed(0))
    for factor in reversed(factors):
        product = factor.float() @ product
    return product.numpy()
