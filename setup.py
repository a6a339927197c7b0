"""Builds three packages, the module that tells transformers about grasp checkpoints, and the compiled kernels.

The kernels are built by ninja, without PyTorch: ``grasp_kernels._cpu`` where there is a C++ compiler, each instruction
set in a file of its own; ``grasp_kernels._cuda`` where there is nvcc as well. ``GRASP_BUILD_CUDA`` is ``1`` (build it
or fail), ``0`` (do not) or ``auto``. Without a compiler the packages install all the same, and the dispatch table says
why its rows are empty.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, TextIO

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.editable_wheel import editable_wheel
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
BUILD = ROOT / "build" / "ninja"
HEADER = CSRC / "lowrank.h"
STUB = '''"""An editable installation of grasp-llm: this package is in a checkout."""

import os
import sys
from importlib.util import module_from_spec, spec_from_file_location

_FILE = {file!r}
if not os.path.exists(_FILE):
    raise ModuleNotFoundError(
        f"{{_FILE}} is gone, which an editable installation of grasp-llm refers to; "
        "run pip uninstall grasp-llm, or pip install --editable with a checkout",
        name=__name__,
    )
_spec = spec_from_file_location(__name__, _FILE)
sys.modules[__name__] = module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
'''
ARCHIVE = "libgrasp_lowrank.a"  # the CPU kernels for other programs; shipped beside the modules, with the header

COMPILE = "-std=c++17 -O3 -g0 -fPIC -fvisibility=hidden -fvisibility-inlines-hidden -Wall -Wextra"
SANITIZE = "-std=c++17 -O0 -g1 -fPIC -fvisibility=hidden -Wall -Wextra"
SANITIZERS = {"address": "-fsanitize=address,undefined -fno-sanitize-recover=all", "thread": "-fsanitize=thread"}
# File in csrc/cpu → flags of its instruction set; on a processor other than x86-64 only portable.cpp is compiled.
X86_FILES = {
    "avx2.cpp": "-mavx2 -mfma -mf16c",
    "avx512.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c",
    "avx512_bf16.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mavx512vnni -mfma -mf16c",
    "amx.cpp": "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mavx512bf16 -mfma -mf16c -mamx-tile -mamx-bf16",
}
CUDA_FLAGS = (
    "-std=c++17 -O3 -Xcompiler -fPIC,-fvisibility=hidden,-Wall "
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -gencode arch=compute_90,code=compute_90"
)


def find_compiler() -> str | None:
    """The command of the C++ compiler, such as ``ccache g++``: ``CXX``, what Python was built with, or a usual name."""
    names = [os.environ.get("CXX"), sysconfig.get_config_var("CXX"), "c++", "g++", "clang++"]
    return next((name for name in names if name and shutil.which(name.split()[0])), None)


def find_nvcc() -> str | None:
    """Path of nvcc: ``CUDACXX``, ``CUDA_HOME``, the search path, or the usual place."""
    names = ["nvcc", "/usr/local/cuda/bin/nvcc"]
    if home := os.environ.get("CUDA_HOME"):
        names.insert(0, f"{home}/bin/nvcc")
    if named := os.environ.get("CUDACXX"):
        names.insert(0, named)
    return next((path for name in names if (path := shutil.which(name))), None)


def wanted_nvcc() -> str | None:
    """nvcc, if ``GRASP_BUILD_CUDA`` allows the CUDA module and its sources are there.

    Raises:
        CompileError: if the module is demanded and cannot be built, or the variable has no meaning.
    """
    choice = os.environ.get("GRASP_BUILD_CUDA", "auto")
    if choice not in ("0", "1", "auto"):
        raise CompileError(f"GRASP_BUILD_CUDA must be 0, 1 or auto, got {choice!r}")
    nvcc = find_nvcc() if choice != "0" and any((CSRC / "cuda").glob("*.cu")) else None
    if choice == "1" and (nvcc is None or find_compiler() is None):
        raise CompileError("GRASP_BUILD_CUDA=1 needs nvcc and a C++ compiler; set CUDACXX to nvcc, or unset the former")
    return nvcc


def x86_files(compiler: str) -> dict[str, str]:
    """The files of x86 instruction sets that this compiler knows, and their flags; none on other processors."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return {}

    def knows(flags: str) -> bool:
        command = [*compiler.split(), *flags.split(), "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    return {name: flags for name, flags in X86_FILES.items() if knows(flags)}


class NinjaFile:
    """Writes build.ninja: the modules, the archive, and for each sanitizer the C++ tests and the CPU module."""

    def __init__(self, output: TextIO, compiler: str, nvcc: str | None) -> None:
        from ninja import ninja_syntax  # a build requirement, absent where nothing is compiled

        self.writer = ninja_syntax.Writer(output, width=120)  # type: ignore[arg-type]  # typed as str
        self.nvcc = nvcc
        self.x86_files = x86_files(compiler)
        self.writer.rule("cxx", f"{compiler} -MMD -MF $out.d $flags -c $in -o $out", depfile="$out.d", deps="gcc")
        self.writer.rule("archive", "rm -f $out && ar rcs $out $in")
        self.writer.rule("link", f"{compiler} $flags $in -o $out")

    def objects(self, flags: str, folder: str) -> list[str]:
        """Compile the CPU kernels, each file with the flags of its instruction set."""
        defines = " ".join(f"-DGRASP_HAS_{Path(name).stem.upper()}" for name in self.x86_files)
        sources = {
            path: self.x86_files.get(path.name, "")
            for path in sorted((CSRC / "cpu").glob("*.cpp"))
            if path.name not in X86_FILES or path.name in self.x86_files
        }
        return [self.compile(path, f"{flags} {defines} {extra}", folder) for path, extra in sources.items()]

    def compile(self, source: Path, flags: str, folder: str) -> str:
        """Compile one file; gives the object's name."""
        output = f"{folder}/{source.stem}.o"
        self.writer.build([output], "cxx", [str(source)], variables={"flags": f"{flags} -I{CSRC}"})
        return output

    def write(self) -> list[str]:
        """Write everything; gives the targets of a plain build."""
        import pybind11

        includes = f"-isystem {pybind11.get_include()} -isystem {sysconfig.get_path('include')}"
        self.writer.build([ARCHIVE], "archive", self.objects(COMPILE, "cpu"))
        bindings = self.compile(CSRC / "bindings.cpp", f"{COMPILE} {includes}", "cpu")
        self.writer.build(["_cpu.so"], "link", [bindings, ARCHIVE], variables={"flags": "-shared -pthread -ldl"})
        for name, sanitizer in SANITIZERS.items():
            flags = f"{SANITIZE} {sanitizer}"
            kernels, variables = self.objects(flags, name), {"flags": f"{flags} -pthread -ldl"}
            test = self.compile(ROOT / "tests" / "csrc" / "test_lowrank.cpp", flags, name)
            self.writer.build([f"{name}/test"], "link", [test, *kernels], variables=variables)
            bindings = self.compile(CSRC / "bindings.cpp", f"{flags} {includes}", name)
            variables["flags"] += " -shared"
            self.writer.build([f"{name}/_cpu.so"], "link", [bindings, *kernels], variables=variables)
        targets = ["_cpu.so", ARCHIVE]
        if self.nvcc is not None:
            self.cuda(self.nvcc, includes)
            targets.append("_cuda.so")
        self.writer.close()
        return targets

    def cuda(self, nvcc: str, includes: str) -> None:
        """Compile and link the CUDA module, with the CUDA runtime inside it."""
        command = f"{nvcc} {CUDA_FLAGS} $includes -I{CSRC} -MD -MF $out.d -c $in -o $out"
        self.writer.rule("nvcc", command, depfile="$out.d", deps="gcc")
        self.writer.rule("nvcc_link", f"{nvcc} -shared -cudart static $in -o $out")
        # Only the bindings see pybind11: its path differs between pip's build environment and the one of build_ext.
        sources = dict.fromkeys(sorted((CSRC / "cuda").glob("*.cu")), "") | {CSRC / "bindings_cuda.cpp": includes}
        objects = [f"cuda/{source.stem}.o" for source in sources]
        for source, output in zip(sources, objects, strict=True):
            self.writer.build([output], "nvcc", [str(source)], variables={"includes": sources[source]})
        self.writer.build(["_cuda.so"], "nvcc_link", objects)


class BuildWithNinja(build_ext):
    """Builds what this machine has the compilers for; ninja's folder is kept, so that only what changed is rebuilt."""

    extensions: list[Extension]

    def finalize_options(self) -> None:
        """Drop the modules that cannot be built here."""
        super().finalize_options()
        self.nvcc = wanted_nvcc()
        self.cxx = find_compiler() if sys.platform == "linux" else None
        able = {"grasp_kernels._cpu": self.cxx is not None, "grasp_kernels._cuda": self.cxx is not None and self.nvcc}
        self.extensions = [extension for extension in self.extensions if able[extension.name]]
        for name, can in able.items():
            if not can:
                print(f"{name} is left out: there is no compiler for it, it is switched off, or this is not Linux")

    def build_extensions(self) -> None:
        """Run ninja, then copy each module to where setuptools wants it."""
        if self.cxx is None:
            return
        run_ninja(write_ninja_file(self.cxx, self.nvcc))
        for extension in self.extensions:
            target = Path(self.get_ext_fullpath(extension.name))
            self.mkpath(str(target.parent / "lib"))
            self.copy_file(str(BUILD / f"{extension.name.rpartition('.')[2]}.so"), str(target))
            self.copy_file(str(BUILD / ARCHIVE), str(target.parent / "lib" / ARCHIVE))

    def copy_extensions_to_source(self) -> None:
        """For an editable install: the modules, and the archive, into the source tree."""
        super().copy_extensions_to_source()
        if self.extensions:
            package = Path(self.get_finalized_command("build_py").get_package_dir("grasp_kernels"))
            self.mkpath(str(package / "lib"))
            self.copy_file(str(BUILD / ARCHIVE), str(package / "lib" / ARCHIVE))


class Sanitize(BuildWithNinja):
    """Builds and runs the C++ tests of the CPU kernels under one of ``SANITIZERS``."""

    description = "run the C++ tests under a sanitizer"
    user_options: ClassVar[list[tuple[str, str | None, str]]] = [
        ("sanitizer=", None, f"one of {', '.join(SANITIZERS)}; the first if it is not given")
    ]

    def initialize_options(self) -> None:
        """Take the first sanitizer."""
        super().initialize_options()
        self.sanitizer = next(iter(SANITIZERS))

    def build_extensions(self) -> None:
        """Run ninja, then the tests; nothing is installed."""
        if self.cxx is None:
            raise CompileError("the C++ tests need Linux and a C++ compiler, and found none")
        write_ninja_file(self.cxx, nvcc=None)
        run_ninja([f"{self.sanitizer}/test"])
        if subprocess.run([str(BUILD / self.sanitizer / "test")]).returncode != 0:
            raise CompileError("the C++ tests failed; what they found is above")


def write_ninja_file(compiler: str, nvcc: str | None) -> list[str]:
    """Write build.ninja into ``BUILD``; gives the targets of a plain build."""
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "build.ninja").open("w") as output:
        return NinjaFile(output, compiler, nvcc).write()


def run_ninja(targets: Sequence[str]) -> None:
    """Build targets in ``BUILD``.

    Raises:
        CompileError: if a file does not compile; the compiler's output is above the message.
    """
    import ninja

    result = subprocess.run([str(Path(ninja.BIN_DIR) / "ninja"), "-C", str(BUILD), *targets])
    if result.returncode != 0:
        raise CompileError("the kernels did not compile; GRASP_BUILD_CUDA=0 leaves the CUDA module out")


class CopyHeader(build_py):
    """Puts lowrank.h into the package, where ``grasp_kernels.get_include()`` finds it; an editable one uses csrc."""

    def run(self) -> None:
        """Copy the Python files, then the header."""
        super().run()
        if not self.editable_mode:
            folder = Path(self.build_lib) / "grasp_kernels" / "include"
            self.mkpath(str(folder))
            self.copy_file(str(HEADER), str(folder / HEADER.name))


class Stubs:
    """Writes an editable install: for each package a file that loads it from the checkout, and a copy of the modules.

    So the packages are regular ones. setuptools writes a finder that comes after ``sys.path``: in the parent of a
    checkout that is called grasp, Python takes that folder for a namespace package. A path to the checkout would make
    all its folders importable, also ``kernels``, the name of a library. The copy of ``grasp_autoload`` lets torch be
    imported when the checkout is gone.
    """

    def __init__(self, folders: dict[str, Path], modules: Sequence[str]) -> None:
        self.folders, self.modules = folders, modules

    def __enter__(self) -> Stubs:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __call__(self, wheel: Any, files: list[str], mapping: dict[str, str]) -> None:
        """Add the files to the wheel."""
        for name, folder in self.folders.items():
            wheel.writestr(f"{name}/__init__.py", STUB.format(file=str(folder / "__init__.py")))
        for name in self.modules:
            wheel.write(ROOT / f"{name}.py", f"{name}.py")


class EditableWheel(editable_wheel):
    """Builds the wheel of ``pip install --editable``, of ``Stubs``."""

    def _select_strategy(self, name: str, tag: str, build_lib: str) -> Stubs:
        packages = [package for package in self.distribution.packages or () if "." not in package]
        folders = {package: ROOT / self.package_dir.get(package, package) for package in packages}
        return Stubs(folders, self.distribution.py_modules or ())


setup(
    packages=[*find_packages(include=["grasp*"]), "grasp_kernels", "grasp_kernels.triton", "speedgate"],
    # speedgate is a distribution of its own as well, packages/pytest-speedgate. It travels along until that is on PyPI
    # and can be named as a dependency.
    package_dir={
        "grasp_kernels": "kernels/grasp_kernels",
        "speedgate": "packages/pytest-speedgate/speedgate",
    },
    py_modules=["grasp_autoload"],
    package_data={
        "grasp": ["py.typed", "reporting/page.*"],
        "grasp_kernels": ["py.typed", "configs/*.json"],
        "speedgate": ["py.typed"],
    },
    # ninja compiles them; setuptools only needs to know what belongs into a source distribution.
    ext_modules=[
        Extension(name, sources=[], depends=sorted(str(path.relative_to(ROOT)) for path in CSRC.rglob("*.*")))
        for name in ("grasp_kernels._cpu", "grasp_kernels._cuda")
    ],
    cmdclass={
        "build_ext": BuildWithNinja,
        "build_py": CopyHeader,
        "editable_wheel": EditableWheel,
        "sanitize": Sanitize,
    },
)
