"""Builds csrc/cuda for the CPU with an emulated CUDA device; see tests/csrc/cuda_on_host."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
import torch

ROOT = Path(__file__).parents[2]
HOST = ROOT / "tests" / "csrc" / "cuda_on_host"
CSRC = ROOT / "csrc"
SOURCES = (*sorted((CSRC / "cuda").glob("*.cu")), CSRC / "bindings_cuda.cpp", *sorted(HOST.glob("*.cpp")))
# The emulator switches threads with longjmp, which fortified glibc reports as an attack.
FLAGS = "-std=c++17 -O1 -fPIC -fvisibility=hidden -Wno-unknown-pragmas -U_FORTIFY_SOURCE"
KINDS = ("shrink", "expand", "cooperative")
DEPENDENT, COOPERATIVE = 6, 2  # cudaLaunchAttributeProgrammaticStreamSerialization, cudaLaunchAttributeCooperative
STREAM = 0x5EED  # a stream's handle


class Launch(NamedTuple):
    """One kernel launch: ``attribute`` is the launch attribute's number, 0 without one."""

    kind: str
    blocks: int
    attribute: int
    stream: int


class Emulator:
    """The module ``grasp_kernels._cuda`` on an emulated device."""

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_cuda", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.library = ctypes.CDLL(str(path))
        self.library.emulator_finish.restype = ctypes.c_char_p
        self.barrier = torch.zeros(1, dtype=torch.int32)
        self.load = self.module.load
        self.workspace_bytes = self.module.workspace_bytes
        self.configure()

    def run(self, *arguments: object) -> None:
        """The module's ``run``, followed by the launches, while the tensors are alive."""
        self.module.run(*arguments)
        self.library.emulator_finish()

    def configure(
        self,
        *,
        capability: int = 90,
        processors: int = 3,
        occupancy: int = 2,
        seed: int = 0,
        failing: str = "",
        error: int = 0,
    ) -> None:
        """Reset the device to a card.

        Args:
            capability: compute capability times 10.
            processors: multiprocessors.
            occupancy: blocks that each of them runs at once.
            seed: of the order in which threads run; 0 is one by one.
            failing: name of a CUDA function that gives ``error``.
            error: a ``cudaError_t``.
        """
        self.library.emulator_set(capability, processors, occupancy, seed, failing.encode(), error)

    def finish(self) -> list[Launch]:
        """Run the launches, fail with the first fault, and return the launches since ``configure``."""
        fault = self.library.emulator_finish().decode()
        assert not fault, fault
        records = (ctypes.c_int64 * 4 * 64)()
        count = self.library.emulator_launches(records, len(records))
        return [Launch(KINDS[kind], *rest) for kind, *rest in records[:count]]


def build(folder: Path) -> Path:
    """Compile and link; skips the test if there is no compiler."""
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    pybind11 = pytest.importorskip("pybind11")
    includes = [f"-I{HOST}", f"-I{CSRC}", "-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]

    def compile_one(source: Path) -> str:
        output = str(folder / f"{source.name}.o")
        run(compiler, *FLAGS.split(), *includes, "-x", "c++", "-c", str(source), "-o", output)
        return output

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, SOURCES))
    run(compiler, "-shared", *objects, "-o", str(folder / "_cuda.so"))
    return folder / "_cuda.so"


def run(*command: str) -> None:
    """Run a command; its output is the message if it fails."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def kinds(launches: list[Launch]) -> list[tuple[str, int]]:
    """Kind and attribute of each launch."""
    return [(launch.kind, launch.attribute) for launch in launches]
