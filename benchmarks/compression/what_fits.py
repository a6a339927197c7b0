"""Estimate the default compression of models of three sizes on four machines: what fits, spans, hours, memory and disk.

Nothing is run. Weights are in bf16; the hours are FLOPs over the peak rates of the cards, or over a rate measured on a
CPU (``benchmarks/results``). The Markdown table goes to stdout.

Example: ``python benchmarks/compression/what_fits.py``
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import LlamaConfig, PreTrainedConfig, Qwen2Config

from grasp.compression.device_speed import Rates, card_rates
from grasp.compression.estimate import Estimate, estimate
from grasp.compression.job import CompressionJob
from grasp.compression.memory_budget import FREE_FRACTION
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError
from grasp.formatting import size
from grasp.method.basis import BASES
from grasp_kernels.roofline import CARDS

NUM_SAMPLES, SEQ_LEN, RATIO = 128, 2048, 0.2
HOST_MEMORY = 64e9
CPU_RECORD = Path(__file__).parents[1] / "results" / "statistics-cpu-amd-epyc.jsonl"
_LLAMA: dict[str, Any] = {"num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192}
MODELS: dict[str, PreTrainedConfig] = {
    "Qwen2.5-1.5B": Qwen2Config(
        hidden_size=1536,
        intermediate_size=8960,
        num_hidden_layers=28,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "Llama-3.1-8B": LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32, **_LLAMA
    ),
    "Llama-3.1-70B": LlamaConfig(
        hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64, **_LLAMA
    ),
}


class Machine(NamedTuple):
    """A machine: memory in bytes for each process, a row of ``CARDS`` or ``None`` for a CPU, and processes.

    Each card has ``HOST_MEMORY`` bytes of CPU memory beside it.
    """

    name: str
    memory: float
    card: str | None
    processes: int = 1


MACHINES = (
    Machine("24 GB card (RTX 4090)", 24e9, "RTX 4090"),
    Machine("80 GB card (H100)", 80e9, "H100"),
    Machine("8 x 80 GB (H100), `--shard`", 80e9, "H100", 8),
    Machine("64 GB CPU, 2 cores", 64e9, None),
)
HEADINGS = ("model", "machine", "`--memory`", "spans", "peak", "least", "CPU memory", "disk", "hours")


def main() -> None:
    """Print the table."""
    print(f"| {' | '.join(HEADINGS)} |\n|---|---|{'--:|' * (len(HEADINGS) - 2)}")
    for name, config in MODELS.items():
        for machine in MACHINES:
            print(f"| {' | '.join((name, machine.name, *cells(config, machine)))} |", flush=True)


def cells(config: PreTrainedConfig, machine: Machine) -> tuple[str, ...]:
    """The cells of one row behind the machine."""
    job = CompressionJob(
        *(config, GraspConfig.best(compression_ratio=RATIO), torch.bfloat16, torch.device("cpu")),
        num_samples=NUM_SAMPLES,
        seq_len=SEQ_LEN,
        processes=machine.processes,
        sharded=machine.processes > 1,
        on_card=machine.card is not None,
    )
    whole = estimate(job)
    budget = int(FREE_FRACTION * (machine.memory - whole.model_bytes))
    try:
        made = estimate(job, memory=budget, host_memory=None if job.on_cpu else int(FREE_FRACTION * HOST_MEMORY))
    except OutOfMemoryError:
        return (f"does not fit: model {size(whole.model_bytes)}", "", "", size(whole.least_memory), "", "", "")
    (sweep,) = made.sweeps
    return (
        size(budget),
        str(sweep.spans) if sweep.runs == sweep.spans else f"{sweep.spans} in {sweep.runs} runs",
        size(made.memory.peak),
        size(made.least_memory),
        "" if machine.card is None else size(machine.processes * made.memory.host),
        size(made.memory.disk),
        f"{float(f'{sum(made.seconds(rates(made, machine)).values()) / 3600:.2g}'):g}",  # 110, not 1.1e+02
    )


def rates(made: Estimate, machine: Machine) -> Rates:
    """The peak rates of a card; of the CPU, the measured rate of a product in fp32 for all, and half of it in fp64."""
    if machine.card is not None:
        tokens = made.batch_size * SEQ_LEN
        return card_rates(CARDS[machine.card], tokens, dtype=torch.bfloat16, basis=BASES["kfac"])
    record = json.loads(CPU_RECORD.read_text().splitlines()[0])
    measured = record["conditions"]["flops"]
    return Rates(sweeps=measured, statistics=measured, svd=measured / 2)


if __name__ == "__main__":
    main()
