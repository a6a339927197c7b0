from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from grasp import environment
from grasp.compression import batch_size
from grasp.compression.batch_size import (
    CPU_TOKENS,
    executable_batch_size,
    fitting_batch_size,
    largest_batch_size,
    try_batch,
)
from grasp.compression.estimate import estimate
from grasp.compression.job import CompressionJob
from grasp.compression.memory_budget import FREE_FRACTION
from grasp.config import GraspConfig
from grasp.environment import free_bytes
from grasp.errors import OutOfMemoryError
from grasp.statistics.processes import Processes
from tests.tiny_models import tiny_model

CPU = torch.device("cpu")
PLENTY = 2**50
SMALL = LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)


def job(num_samples: int = 16, seq_len: int = 256, config: GraspConfig | None = None) -> CompressionJob:
    return CompressionJob(SMALL, config or GraspConfig(layers=(1,)), torch.float32, CPU, num_samples, seq_len)


def out_of_memory() -> torch.OutOfMemoryError:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def test_the_largest_power_of_two_that_fits_is_taken() -> None:
    memory = estimate(job(), 4).memory
    needed = memory.peak - memory.hidden_states
    assert largest_batch_size(job(), needed - 1).batch_size == 2
    assert largest_batch_size(job(), needed).batch_size == 4
    with pytest.raises(OutOfMemoryError, match="at least"):
        largest_batch_size(job(), estimate(job()).least_memory - 1)


def test_no_batch_is_so_large_that_layers_run_more_often() -> None:
    best = job(config=GraspConfig.best(compression_ratio=0.1))
    budget = estimate(best, 4).least_memory  # a batch of 4 fits if the sums of a layer are divided
    assert sum(sweep.runs - sweep.spans for sweep in estimate(best, 4, memory=budget).sweeps) > 0
    chosen = largest_batch_size(best, budget)
    assert chosen.batch_size < 4
    assert all(sweep.runs == sweep.spans for sweep in chosen.sweeps)


def test_a_batch_is_limited_by_the_samples_and_by_the_tokens_for_a_cpu() -> None:
    assert largest_batch_size(job(num_samples=3), PLENTY).batch_size == 2
    assert largest_batch_size(job(), PLENTY).batch_size * 256 == CPU_TOKENS[4]
    narrow = GraspConfig(layers=(1,), sweep_dtype="bfloat16")
    assert largest_batch_size(job(config=narrow), PLENTY).batch_size * 256 == CPU_TOKENS[2]
    assert largest_batch_size(job(num_samples=4, seq_len=2048), PLENTY).batch_size == 1


def test_a_batch_size_is_reduced_until_it_runs() -> None:
    tried: list[int] = []

    def trial(size: int) -> None:
        tried.append(size)
        if size > 5:
            raise out_of_memory()

    largest = executable_batch_size(16, trial)
    assert largest == tried[-1] <= 5
    assert tried[0] == 16
    assert tried == sorted(tried, reverse=True)


def test_no_room_for_one_sequence_is_an_error_with_a_remedy() -> None:
    def trial(size: int) -> None:
        raise out_of_memory()

    with pytest.raises(OutOfMemoryError, match="too little memory for a batch of one sequence"):
        executable_batch_size(2, trial)


def test_other_errors_of_a_trial_are_not_hidden() -> None:
    def trial(size: int) -> None:
        raise RuntimeError("a defect")

    with pytest.raises(RuntimeError, match="a defect"):
        executable_batch_size(2, trial)


@pytest.mark.parametrize("config", [GraspConfig(layers=(1,)), GraspConfig(num_layers=1, schedule="single-sweep")])
def test_a_trial_leaves_the_model_as_it_was(config: GraspConfig) -> None:
    model = tiny_model("llama")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    names = [name for name, _ in model.named_modules()]
    shapes: list[torch.Size] = []
    model.model.embed_tokens.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    try_batch(model, config, 10**9, 16, 2)
    assert torch.Size([2, 16]) in shapes
    assert [name for name, _ in model.named_modules()] == names
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


def test_a_batch_size_for_a_model_comes_from_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_model("llama"), GraspConfig(layers=(1,))
    job = CompressionJob(model.config, config, model.dtype, CPU, 8, 128)
    taken = estimate(job, 2).memory
    needs = taken.peak - taken.hidden_states
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: needs / FREE_FRACTION + 1)
    assert fitting_batch_size(model, job) == 2
    assert fitting_batch_size(model, job, memory=2 * needs) > 2
    monkeypatch.setattr(batch_size, "free_bytes", lambda device: 2 * needs / FREE_FRACTION + 2)
    assert fitting_batch_size(model, job, processes=Processes(0, 2)) == 2


def test_the_memory_limit_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "_CGROUP", tmp_path)
    unlimited = free_bytes(CPU)
    assert unlimited > 0
    (tmp_path / "memory.max").write_text("5000\n")
    (tmp_path / "memory.current").write_text("3000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 700\n")
    assert free_bytes(CPU) == 2700
    (tmp_path / "own").write_text("4:memory:/v1\n0::/slurm/job\n")
    monkeypatch.setattr(environment, "_OWN_CGROUP", tmp_path / "own")
    assert free_bytes(CPU) == 2700
    (group := tmp_path / "slurm").mkdir()
    (group / "memory.max").write_text("4000\n")
    (group / "memory.current").write_text("3900\n")
    (group / "memory.stat").write_text("anon 1000\n")
    assert free_bytes(CPU) == 100
    (group / "memory.max").write_text("max\n")
    assert free_bytes(CPU) == 2700
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(CPU) > 2700
