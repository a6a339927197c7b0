from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
SOURCES = sorted((CSRC / "cuda").glob("*_*.cu"))
ARCHITECTURES = (80, 90)
# Of each architecture: a shrink, an expand and a cooperative kernel of each form, and the first two for int8 and int4.
KERNELS = 5 * (4 + 3 + 3) + 2 * 2 * (3 + 3)
THREADS, REGISTERS = 128, 1 << 16  # of a block, of a processor

NAME = re.compile(
    r"lowrank_(shrink|expand|cooperative)_kernelI(f|NS_3F16E|NS_4BF16E)(?:Li([048])E)?Li(\d+)ELb([01])E(?:Lb([01])E)?"
)
RESOURCES = re.compile(r"Function (\w+):\s+(REG:.*)")
NUMBER = re.compile(r"(\w+):(\d+)")
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
WEIGHTS, QUANTIZED = "LDG.E.EF.128", "LDG.E.EF.64"  # 16 bytes, or 8 of a quantised weight, evicted first
HIDDEN = "LDG.E.128.STRONG.GPU"  # 16 bytes, bypassing the first-level cache
POLL = "LDG.E.STRONG.GPU"  # of the barrier; later ones load h for the outputs of pivots
SYSTEM_LIBRARIES = {  # of every Linux with glibc; libcuda, libcudart and libpython are not among them
    *("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1", "libc.so.6", "libdl.so.2", "libm.so.6", "libpthread.so.0"),
    *("librt.so.1", "libgcc_s.so.1", "libstdc++.so.6"),
}


class Kernel(NamedTuple):
    kind: str
    dtype: str
    bits: int
    rows: int
    vector: bool
    pivoted: bool

    @classmethod
    def parse(cls, mangled: str) -> Kernel:
        match = NAME.search(mangled)
        assert match, mangled
        kind, dtype, bits, rows, *flags = match.groups()
        vector, pivoted = (flag == "1" for flag in flags)
        name = {"f": "f32", "NS_3F16E": "f16", "NS_4BF16E": "bf16"}[dtype]
        return cls(kind, name, int(bits or 0), int(rows), vector, pivoted)

    @property
    def weights(self) -> str:
        """The instruction that loads a weight."""
        return QUANTIZED if self.bits else WEIGHTS


def find_cuobjdump() -> str | None:
    """The disassembler of CUDA, or the one inside Triton's wheel."""
    if (path := shutil.which("cuobjdump")) is not None:
        return path
    triton = pytest.importorskip("triton", reason="there is neither cuobjdump nor Triton, which has one")
    return shutil.which(triton.knobs.nvidia.cuobjdump.path)


@pytest.fixture(scope="module")
def module() -> str:
    """Path of the CUDA module that `make build` compiled."""
    found = importlib.util.find_spec("grasp_kernels._cuda")
    if found is None or found.origin is None:
        pytest.skip("the CUDA module is not built here")
    return found.origin


@pytest.fixture(scope="module")
def disassembler() -> str:
    if (cuobjdump := find_cuobjdump()) is None:
        pytest.skip("there is no cuobjdump")
    return cuobjdump


@pytest.fixture(scope="module")
def usage(module: str, disassembler: str) -> dict[tuple[int, Kernel], dict[str, int]]:
    """Registers, and bytes of stack and local memory, of each kernel."""
    found = {}
    for listing in dump(disassembler, "-res-usage", module).split("Fatbin elf code:")[1:]:
        for mangled, numbers in RESOURCES.findall(listing):
            values = {name: int(number) for name, number in NUMBER.findall(numbers)}
            found[int(re.findall(r"arch = sm_(\d+)", listing)[0]), Kernel.parse(mangled)] = values
    return found


@pytest.fixture(scope="module")
def instructions(module: str, disassembler: str) -> dict[tuple[int, Kernel], list[str]]:
    """Mnemonics of each kernel in program order."""
    found = {}
    for architecture in ARCHITECTURES:
        listing = dump(disassembler, "-sass", "-arch", f"sm_{architecture}", module)
        for function in listing.split("Function : ")[1:]:
            found[architecture, Kernel.parse(function.partition("\n")[0])] = INSTRUCTION.findall(function)
    return found


def dump(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def select(
    instructions: dict[tuple[int, Kernel], list[str]], wanted: Callable[[int, Kernel], bool]
) -> list[tuple[Kernel, list[str]]]:
    chosen = [(kernel, names) for (architecture, kernel), names in instructions.items() if wanted(architecture, kernel)]
    assert chosen
    return chosen


def positions(names: list[str], mnemonic: str) -> list[int]:
    return [place for place, name in enumerate(names) if name == mnemonic]


def widths(names: list[str]) -> set[str]:
    """The kinds of loads from global memory."""
    return {name for name in names if name.startswith("LDG")}


def test_every_kernel_is_there_for_every_architecture(usage: dict[tuple[int, Kernel], dict[str, int]]) -> None:
    assert len(usage) == KERNELS * len(ARCHITECTURES)
    assert {architecture for architecture, _ in usage} == set(ARCHITECTURES)


def test_no_kernel_spills_or_uses_local_memory(usage: dict[tuple[int, Kernel], dict[str, int]]) -> None:
    assert {(numbers["STACK"], numbers["LOCAL"]) for numbers in usage.values()} == {(0, 0)}


def test_registers_suffice_for_two_blocks_of_a_processor_and_mostly_three(
    usage: dict[tuple[int, Kernel], dict[str, int]],
) -> None:
    def blocks(registers: int) -> int:
        return REGISTERS // (-(-registers // 8) * 8 * THREADS)  # granted in eights

    for (architecture, kernel), numbers in usage.items():
        few = kernel.vector and (kernel.rows == 8 or (kernel.rows < 8 and kernel.kind == "expand"))
        assert blocks(numbers["REG"]) >= (3 if few else 2), (architecture, kernel)


def test_ptx_for_later_cards_is_there(module: str, disassembler: str) -> None:
    ptx = dump(disassembler, "-ptx", module).split("Fatbin ptx code:")[1:]
    kernels = [text for text in ptx if "lowrank_" in text]
    assert len(kernels) == len(SOURCES)
    for text in kernels:
        assert ".target sm_90" in text
        assert "griddepcontrol.wait" in text


def test_factors_are_read_by_16_or_8_bytes(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    for kernel, names in select(instructions, lambda _, kernel: kernel.vector):
        assert {name for name in widths(names) if ".EF" in name} == {kernel.weights}
        if kernel.kind == "shrink":
            scales = {"LDG.E", "LDG.E.U16"} if kernel.bits else set()
            assert widths(names) - scales == {kernel.weights, "LDG.E.128"}, kernel  # Vh and x
    for kernel, names in select(instructions, lambda _, kernel: not kernel.vector):
        assert kernel.weights not in names, kernel


def test_products_of_16_bit_factors_use_tensor_cores(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    cores = {"f16": "HMMA.16816.F32", "bf16": "HMMA.16816.F32.BF16", "f32": None}
    for kernel, names in select(instructions, lambda *_: True):
        used = {name for name in names if name.startswith("HMMA")}
        assert used == ({cores[kernel.dtype]} - {None}), kernel


def test_u_is_fetched_before_the_wait_and_h_after_it(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    for kernel, names in select(instructions, lambda sm, kernel: sm == 90 and kernel.kind == "expand"):
        (wait,) = positions(names, "ACQBULK")
        assert min(positions(names, HIDDEN) + positions(names, POLL)) > wait, kernel
        if kernel.vector:
            before = [place for place in positions(names, kernel.weights) if place < wait]
            assert len(before) == first_stage(kernel), kernel


def test_the_shrink_lets_the_expand_start_at_once(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    for kernel, names in select(instructions, lambda sm, kernel: sm == 90 and kernel.kind == "shrink"):
        (start,) = positions(names, "PREEXIT")
        assert start < min(place for place, name in enumerate(names) if name.startswith("LDG")), kernel


def test_older_cards_get_no_dependent_launch(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    for kernel, names in select(instructions, lambda sm, _: sm == 80):
        assert not {"ACQBULK", "PREEXIT"} & set(names), kernel


def test_the_barrier_is_arrival_then_u_then_wait_then_h(instructions: dict[tuple[int, Kernel], list[str]]) -> None:
    for kernel, names in select(instructions, lambda _, kernel: kernel.kind == "cooperative"):
        (arrival,) = (place for place, name in enumerate(names) if name.startswith("ATOM"))
        poll, *pivots = positions(names, POLL)
        assert bool(pivots) == kernel.pivoted, kernel
        assert any(name.startswith("STG") for name in names[:arrival]), kernel
        assert "MEMBAR" in " ".join(names[arrival - 3 : arrival]), kernel  # release
        assert arrival < poll < min(positions(names, HIDDEN)), kernel
        if kernel.vector:
            between = [place for place in positions(names, kernel.weights) if arrival < place < poll]
            assert len(between) == first_stage(kernel), kernel


def first_stage(kernel: Kernel) -> int:
    """Loads of U that a lane has in flight: tiles times steps."""
    return 4 if kernel.dtype == "f32" and kernel.rows > 8 else 8


def test_the_module_needs_nothing_of_the_machine_that_built_it(module: str) -> None:
    """The CUDA runtime is inside it, and that finds the driver when it is first used."""
    if (readelf := shutil.which("readelf")) is None:
        pytest.skip("there is no readelf")
    dynamic = dump(readelf, "--dynamic", "--wide", module)
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert set(needed) <= SYSTEM_LIBRARIES, needed
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic)
