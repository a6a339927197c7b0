"""Compile a Triton launch without a GPU; read registers, memory and instructions of the binary."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

ARCHITECTURES = (80, 90, 100, 120)  # compute capability times 10
SHARED_LIMITS = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}  # most bytes of a program

_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_GLOBAL_LOAD = re.compile(r"(?:LDG|LDGSTS)\b")
# Bytes per thread by suffix of a load's mnemonic; 4 without a suffix.
_WIDTHS = {"256": 32, "128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}


@dataclass(frozen=True)
class Binary:
    """The assembled binary of a launch."""

    architecture: int
    registers: int  # per thread
    stack: int  # bytes per thread
    local: int  # bytes per thread
    shared: int  # bytes per program
    instructions: tuple[str, ...]  # mnemonics in program order

    def count(self, prefix: str) -> int:
        """Number of instructions whose mnemonic starts with ``prefix``."""
        return sum(name.startswith(prefix) for name in self.instructions)

    def loads(self) -> Counter[int]:
        """Number of loads from global memory by width, in bytes per thread."""
        return Counter(load_width(name) for name in self.instructions if _GLOBAL_LOAD.match(name))

    def copied_bytes(self) -> int:
        """Bytes per thread of all asynchronous copies to shared memory that the code names, each counted once."""
        return sum(load_width(name) for name in self.instructions if name.startswith("LDGSTS"))


def load_width(mnemonic: str) -> int:
    """Bytes per thread of a load such as ``LDG.E.EF.128``."""
    return next((_WIDTHS[part] for part in reversed(mnemonic.split(".")) if part in _WIDTHS), 4)


@dataclass(frozen=True)
class Source:
    """A launch as Triton specializes it for a GPU: exactly the facts that decide the binary."""

    source: ASTSource
    target: GPUTarget
    options: Any

    @property
    def key(self) -> str:
        """Equal for two launches that share a binary."""
        return f"{self.source.hash()} {self.target} {self.options}"


def specialize(architecture: int, kernel: Any, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> Source:
    """Reduce a launch's arguments to types, constants and divisibilities, with Triton's own binder.

    Args:
        architecture: compute capability times 10.
        kernel: a ``triton.jit`` function, imported without ``TRITON_INTERPRET``.
        arguments: by parameter name; tensors may be on the ``meta`` device.
        options: ``num_warps`` and the like.
    """
    target = GPUTarget("cuda", architecture, 32)
    backend = make_backend(target)
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    bound, specialization, _ = bind(**arguments, **options)
    parsed, signature, constants, attributes = kernel._pack_args(backend, dict(options), bound, specialization, None)
    return Source(ASTSource(kernel, signature, constants, attributes), target, parsed)


def compile_source(source: Source) -> Binary:
    """Compile, and read the binary."""
    compiled = triton.compile(source.source, target=source.target, options=source.options.__dict__)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        resources, sass = _cuobjdump("--dump-resource-usage", file.name), _cuobjdump("--dump-sass", file.name)
    return read(source.target.arch, resources, sass, compiled.metadata.shared)


def read(architecture: int, resources: str, sass: str, shared: int) -> Binary:
    """Read a binary from the two reports of ``cuobjdump``; ``shared`` is the launch's shared memory in bytes."""
    usage = _RESOURCES.search(resources)
    if usage is None:
        raise ValueError(f"expected REG, STACK, SHARED and LOCAL from cuobjdump, got {resources!r}")
    registers, stack, local = map(int, usage.groups())
    return Binary(architecture, registers, stack, local, shared, tuple(_INSTRUCTION.findall(sass)))


def _cuobjdump(report: str, path: str) -> str:
    """Run the disassembler in Triton's wheel."""
    command = [triton.knobs.nvidia.cuobjdump.path, report, path]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
