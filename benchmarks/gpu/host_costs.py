"""Measure the host's part of low-rank calls on the Triton path without a GPU: everything but the launch itself.

``python -m benchmarks.gpu.host_costs`` compiles the kernels for an H100, and runs calls with a driver of Triton that
loads and launches nothing. Tensors are on the CPU. Times are those of the processor in one thread, so they depend
little on what else runs; a GPU's allocator and the driver's launches are not in them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from unittest import mock

import torch
import triton
import typer
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from benchmarks.gpu.aot_cases import CARDS
from grasp.bench.conditions import commit, device_name
from grasp_kernels import dispatch, lowrank_linear_grouped, pack_factors
from grasp_kernels.launch_configs import choose
from grasp_kernels.reference import Factors
from grasp_kernels.shapes import parse_shape
from grasp_kernels.triton import lowrank_linear, prepared

SHAPES = ("4096x4096r204", "4096x11008r298+4096x11008r298", "4096x4096r204+4096x1024r81+4096x1024r81")
ROWS = (1, 4, 16)
CALLS, REPETITIONS = 300, 15
RESULTS = Path(__file__).parents[1] / "results" / "host-triton-cpu-amd-epyc.json"


class StubDriver:
    """A driver of Triton whose GPU is an H100. It records the launches instead of making them."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] | None = None  # grid, stream and arguments; None: not recorded
        self.utils = self

    def get_current_device(self) -> int:
        """The only device."""
        return 0

    def get_current_stream(self, device: int | None) -> int:
        """The only stream."""
        return 0

    def get_current_target(self) -> GPUTarget:
        """An H100."""
        return GPUTarget("cuda", 90, 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """What Triton asks for."""
        return {"max_shared_mem": 232448}

    def load_binary(self, *_: object) -> tuple[int, int, int, int, int]:
        """Module, function, registers, spills, most threads."""
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        """Nothing was loaded."""

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Stands for the launcher: its Python takes about 1 µs, which is not measured, and its C the rest."""

        def launch(x: int, y: int, z: int, stream: int, *rest: Any) -> None:
            if self.launches is not None:
                self.launches.append((x, y, z, stream, *rest[5:]))

        return launch


@contextmanager
def stubbed() -> Iterator[StubDriver]:
    """Inside, the Triton backend accepts CPU tensors. Triton keeps the driver until the process ends."""
    stub = StubDriver()

    def nothing(*_: object) -> None:
        return None

    backends = tuple(
        replace(row, missing=nothing, refuses=nothing) if row.name == "triton" else row for row in dispatch.BACKENDS
    )
    driver.set_active(stub)
    dispatch.backend_missing.cache_clear()
    with (
        mock.patch.object(dispatch, "BACKENDS", backends),
        mock.patch.object(lowrank_linear, "gpu_of", return_value=CARDS[90]),
    ):
        yield stub
    dispatch.backend_missing.cache_clear()


@dataclass(frozen=True)
class HostTime:
    """Processor time of one call in µs, least of several batches."""

    shapes: str
    rows: int
    public_op: float  # grasp_kernels.lowrank_linear_grouped: checks, dispatch table, then the rest
    planned: float  # a call that plans and binds its launches, as every call did before there were prepared pairs
    prepared: float  # a call that finds a prepared pair
    describe: float  # part of ``prepared``: the description of the call
    allocate: float  # part of ``prepared``: outputs and h
    launch: float  # part of ``prepared``: both launches, without Triton's launcher


def factors_of(label: str) -> list[Factors]:
    """Packed factors of a group in bf16."""
    empty = [
        Factors(torch.zeros(N, R, dtype=torch.bfloat16), None, torch.zeros(R, K, dtype=torch.bfloat16))
        for K, N, R in parse_shape(label)
    ]
    return pack_factors(empty)


def measure(label: str, rows: int, factors: list[Factors], calls: int = CALLS) -> HostTime:
    """Measure the calls of one group inside ``stubbed()``."""
    x = torch.zeros(rows, factors[0].Vh.shape[1], dtype=torch.bfloat16)
    config = choose(*_choice(x, factors))
    if config.path != "pair":
        raise ValueError(f"{label} with {rows} rows is run by {config.path}, expected a pair of launches")
    lowrank_linear.lowrank_linear_grouped(x, factors)
    key, _ = prepared.describe(x, factors, None)
    pair = prepared.PREPARED[key]

    def allocate() -> None:
        for width in pair.widths:
            x.new_empty(rows, width)
        x.new_empty(pair.hidden)

    def launch() -> None:
        for kernel, arguments in ((pair.shrink, ((2,), 3, 4, None, None)), (pair.expand, ((2,), (3,), (4,), 5, None))):
            kernel.launcher(*kernel.grid, 0, *kernel.handles, 1, *arguments, *kernel.rest)

    def least(function: Callable[[], object]) -> float:
        return round(min(_seconds(function, calls) for _ in range(REPETITIONS)) * 1e6, 2)

    return HostTime(
        label,
        rows,
        public_op=least(lambda: lowrank_linear_grouped(x, factors, backend="triton")),
        planned=least(lambda: lowrank_linear.run(x, factors, choose(*_choice(x, factors)))),
        prepared=least(lambda: lowrank_linear.lowrank_linear_grouped(x, factors)),
        describe=least(lambda: prepared.describe(x, factors, None)),
        allocate=least(allocate),
        launch=least(launch),
    )


def _choice(x: torch.Tensor, factors: list[Factors]) -> tuple[Any, ...]:
    return "lowrank_linear", CARDS[90], lowrank_linear.launch_key(x, factors)


def _seconds(function: Callable[[], object], calls: int) -> float:
    start = time.thread_time()
    for _ in range(calls):
        function()
    return (time.thread_time() - start) / calls


def main(
    calls: Annotated[int, typer.Option(help="Calls in a batch.")] = CALLS,
    output: Annotated[Path, typer.Option(help="The JSON file to write.")] = RESULTS,
) -> None:
    """Measure the host's part of low-rank calls on the Triton path."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set, and the interpreter binds nothing; unset it")
    with stubbed(), torch.no_grad():
        times = [
            measure(label, rows, factors, calls) for label in SHAPES for factors in [factors_of(label)] for rows in ROWS
        ]
    conditions = {"device": device_name(torch.device("cpu")), "threads": torch.get_num_threads(), "commit": commit()}
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    output.write_text(json.dumps({**conditions, **versions, "rows": [asdict(row) for row in times]}, indent=1))
    typer.echo(f"{'µs':44}{'rows':>5}{'op':>8}{'planned':>9}{'prepared':>10}")
    for row in times:
        typer.echo(f"{row.shapes:44}{row.rows:5}{row.public_op:8.1f}{row.planned:9.1f}{row.prepared:10.1f}")


if __name__ == "__main__":
    typer.run(main)
