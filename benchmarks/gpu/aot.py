"""Compile the Triton kernels for several architectures without a GPU, and check the binaries.

``python -m benchmarks.gpu.aot`` compiles all configurations for all architectures. It prints registers, shared memory
and instructions of each binary, writes them as JSON, and exits with 1 if a check fails.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import triton
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.gpu.aot_cases import (
    CARDS,
    LAUNCH_DEPENDENTS,
    TENSOR_CORES,
    WAIT,
    AotCase,
    cases,
    complaints,
    copied_ahead,
    prefetched,
)
from benchmarks.gpu.sass import ARCHITECTURES, Binary, compile_source, specialize
from grasp_kernels.triton.launch import Launch

RESULTS = Path(__file__).parents[1] / "results" / "aot.json"


@dataclass(frozen=True)
class BinaryRow:
    """One binary."""

    kernel: str
    case: str
    architecture: int  # compute capability times 10
    registers: int  # per thread
    shared: int  # bytes per program
    stack: int  # bytes per thread; registers were spilled if not 0
    instructions: int
    tensor_core: dict[str, int]  # instructions by mnemonic
    loads: dict[str, int]  # global loads by bytes per thread
    copied_ahead: int  # bytes per program that loops keep in flight
    prefetched: int  # bytes of U per program that a dependent launch loads before it waits
    dependent_launch: int  # instructions
    complaints: list[str]


def compile_case(case: AotCase, architectures: Sequence[int], seen: set[str]) -> list[BinaryRow]:
    """Compile a case's launches, without the binaries of earlier cases, which are in ``seen``."""
    rows = []
    for architecture in architectures:
        for launch in case.launches(CARDS[architecture]):
            source = specialize(architecture, launch.kernel, launch.arguments, launch.options)
            if source.key not in seen:
                seen.add(source.key)
                rows.append(_row(case, launch, compile_source(source)))
    return rows


def _row(case: AotCase, launch: Launch, binary: Binary) -> BinaryRow:
    return BinaryRow(
        kernel=launch.kernel.__name__,
        case=case.name,
        architecture=binary.architecture,
        registers=binary.registers,
        shared=binary.shared,
        stack=binary.stack + binary.local,
        instructions=len(binary.instructions),
        tensor_core={name: count for name in TENSOR_CORES if (count := binary.count(name))},
        loads={str(width): count for width, count in sorted(binary.loads().items())},
        copied_ahead=copied_ahead(launch, binary),
        prefetched=prefetched(launch, binary),
        dependent_launch=binary.count(WAIT) + binary.count(LAUNCH_DEPENDENTS),
        complaints=complaints(launch, binary),
    )


def print_table(rows: Sequence[BinaryRow], console: Console) -> None:
    """Print one line per binary."""
    table = Table("kernel", "case", "sm", "registers", "shared", "ahead", "instructions", "tensor core", "loads")
    table.add_column("complaints")
    for row in rows:
        tensor_core = ", ".join(f"{count} {name}" for name, count in row.tensor_core.items())
        loads = ", ".join(f"{count} of {width} B" for width, count in row.loads.items())
        numbers = map(str, (row.architecture, row.registers, row.shared, row.copied_ahead, row.instructions))
        table.add_row(row.kernel, row.case, *numbers, tensor_core, loads, "; ".join(row.complaints))
    console.print(table)


def main(
    representative: Annotated[bool, typer.Option(help="Compile one configuration per kernel instead of all.")] = False,
    architecture: Annotated[
        list[int] | None, typer.Option(help="Compute capability times 10, such as 90. Default: all.")
    ] = None,
    only: Annotated[str, typer.Option(help="Compile only cases whose name contains this text.")] = "",
    output: Annotated[
        Path | None,
        typer.Option(help="The JSON file to write. Default, for all binaries only: that of the repository."),
    ] = None,
) -> None:
    """Compile the Triton kernels ahead of time and check their binaries."""
    if triton.knobs.runtime.interpret:
        raise typer.BadParameter("TRITON_INTERPRET is set, and the interpreter compiles nothing; unset it")
    if unknown := sorted({*(architecture or ())} - {*ARCHITECTURES}):
        raise typer.BadParameter(
            f"unknown architecture {unknown[0]}; expected some of {', '.join(map(str, ARCHITECTURES))}"
        )
    if output is None and (representative or architecture or only):
        raise typer.BadParameter("a part of the binaries does not replace the results of all; give --output")
    console = Console(width=200)
    rows: list[BinaryRow] = []
    seen: set[str] = set()
    for case in cases():
        if only in case.name and (case.representative or not representative):
            rows += compile_case(case, architecture or ARCHITECTURES, seen)
    if not rows:
        raise typer.BadParameter(f"no case has {only!r} in its name")
    output = RESULTS if output is None else output
    output.write_text(json.dumps({"triton": triton.__version__, "rows": [asdict(row) for row in rows]}, indent=1))
    print_table(rows, console)
    wrong = sum(bool(row.complaints) for row in rows)
    console.print(f"{len(rows)} binaries, {wrong} with complaints; written to {output}")
    raise typer.Exit(code=1 if wrong else 0)


if __name__ == "__main__":
    typer.run(main)
