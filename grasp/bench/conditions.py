"""The conditions of a measurement: the device and its speed, versions, and the state of the code."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from grasp.environment import free_bytes, installed_version
from grasp_kernels import cpu, roofline
from grasp_kernels.dispatch import backend_missing
from grasp_kernels.roofline import Card
from speedgate.devices import processor_name
from speedgate.timing import Rotation, batch

ROOT = Path(__file__).resolve().parents[2]
READ_BYTES = 1 << 30  # size, at most, of the buffer that is read to measure the bandwidth
MATMUL_SIZE = {"cpu": 1024, "cuda": 8192}
REPETITIONS = 5
CLOCK_RAMP = 1.0  # seconds of work before a GPU's speeds are measured
# Calls that read a matrix once and write almost nothing. The fastest one depends on the device: on AMD processors the
# product runs on one thread and reads half as fast as a sum.
READERS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda matrix: matrix @ matrix.new_ones(matrix.shape[1]),
    lambda matrix: matrix.sum(1),
)


@dataclass(frozen=True)
class Conditions:
    """The facts needed to interpret a time, and to measure it again.

    Attributes:
        device: name of the processor or GPU.
        threads: number of threads of a CPU.
        read_bandwidth: bytes/s of reading a large matrix, measured in this run.
        flops: FLOP/s of a large matmul in the dtype of the results, measured in this run.
        torch: version.
        triton: version; ``None`` if it is not installed.
        python: version.
        commit: commit of the checkout; ``None`` outside a checkout.
        dirty: whether tracked files differ from the commit.
        started: time after the measurement of the speeds, UTC.
        instruction_sets: instruction sets of ``grasp_kernels.cpu`` that a CPU supports.
    """

    device: str
    threads: int | None
    read_bandwidth: float
    flops: float
    torch: str
    triton: str | None
    python: str
    commit: str | None
    dirty: bool | None
    started: str
    instruction_sets: Sequence[str] | None = None

    @property
    def processor(self) -> str:
        """``"Xeon, 2 threads"``."""
        threads = "" if self.threads is None else f", {self.threads} thread{'s' if self.threads > 1 else ''}"
        return self.device + threads

    def __str__(self) -> str:
        """Processor, version of torch, commit and day."""
        commit = f"commit {self.commit[:10]}" if self.commit else "no commit"
        changes = " with changes" if self.dirty else ""
        return f"{self.processor}; torch {self.torch}; {commit}{changes}; {self.started[:10]}"


def conditions(card: Card, device: torch.device) -> Conditions:
    """The present conditions, with the measured speeds of ``card``."""
    return Conditions(
        device=card.name,
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        read_bandwidth=card.bandwidth,
        flops=card.flops,
        torch=torch.__version__,
        triton=installed_version("triton"),
        python=platform.python_version(),
        commit=commit(),
        dirty=None if (changes := _git("status", "--porcelain", "--untracked-files=no")) is None else bool(changes),
        started=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        instruction_sets=_instruction_sets() if device.type == "cpu" else None,
    )


def commit() -> str | None:
    """The commit of this checkout, or ``None`` outside one."""
    return _git("rev-parse", "HEAD")


def device_name(device: torch.device) -> str:
    """The processor's own name."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name()


@torch.inference_mode()
def measure_card(device: torch.device, dtype: torch.dtype) -> Card:
    """The device's present limits: bytes/s of the fastest of ``READERS``, FLOP/s of a large matmul."""
    if device.type not in MATMUL_SIZE:
        raise ValueError(f"benchmarks run on {' or '.join(MATMUL_SIZE)}, got {device}")
    warm_up(device, CLOCK_RAMP)
    width = 4096
    matrix = torch.ones(max(1, min(READ_BYTES, free_bytes(device) // 4) // (4 * width)), width, device=device)
    size = MATMUL_SIZE[device.type]
    square = torch.randn(size, size, device=device).to(dtype)
    return roofline.Card(
        device_name(device),
        flops=2 * size**3 / _best(device, lambda: square @ square),
        bandwidth=matrix.nbytes / min(_best(device, partial(read, matrix)) for read in READERS),
    )


def warm_up(device: torch.device, seconds: float) -> None:
    """Keep a GPU busy with matrix products, so that its clocks rise; nothing on a CPU."""
    if device.type != "cuda":
        return
    square = torch.ones(4096, 4096, device=device, dtype=torch.bfloat16)
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for _ in range(20):
            square @ square
        torch.cuda.synchronize(device)


def _best(device: torch.device, call: Callable[[], object]) -> float:
    """Shortest of ``REPETITIONS`` times of a call, in seconds; on a GPU of graphs of calls, by the GPU's clock."""
    if device.type == "cuda":
        timed = batch(device.type, lambda _: call(), Rotation([None]))
        return min(timed.seconds() for _ in range(REPETITIONS))
    times = []
    for _ in range(REPETITIONS + 1):  # the first warms up
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times[1:])


def _instruction_sets() -> tuple[str, ...]:
    if backend_missing("cpu") is not None:
        return ()
    return tuple(name for name in cpu.INSTRUCTION_SETS if name != "auto" and cpu.supports(name))


def _git(*arguments: str) -> str | None:
    """Output of git in this checkout, or ``None`` outside one."""
    if not (ROOT / ".git").exists():  # git would look in the folders above, such as one that has this environment
        return None
    try:
        answer = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return answer.stdout.strip()
