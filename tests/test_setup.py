from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = (
    "csrc",
    "grasp",
    "kernels",
    "packages",
    "tests/csrc",
    "setup.py",
    "pyproject.toml",
    "grasp_autoload.py",
    "README.md",
    "LICENSE",
)
USE = """
import sys
import torch
import grasp_kernels
import speedgate.timing
from pathlib import Path
assert grasp_kernels.explain("lowrank_linear", rows=1, rank=4)["cpu"] == "chosen"
x, U, Vh = torch.randn(1, 8), torch.randn(6, 4), torch.randn(4, 8)
torch.testing.assert_close(grasp_kernels.lowrank_linear(x, U, None, Vh, backend="cpu"), x @ Vh.T @ U.T)
assert (Path(grasp_kernels.get_include()) / "lowrank.h").exists()
assert (Path(grasp_kernels.__file__).parent / "lib" / "libgrasp_lowrank.a").exists()
assert "grasp_kernels._cuda" not in sys.modules
print(grasp_kernels.__file__)
"""

needs_compiler = pytest.mark.skipif(
    sys.platform != "linux" or shutil.which("c++") is None, reason="there is no C++ compiler for Linux"
)
pytestmark = pytest.mark.slow


def copied_to(folder: Path) -> Path:
    """A checkout of the sources that is called grasp, without anything built."""
    unwanted = shutil.ignore_patterns("*.so", "*.a", "__pycache__")
    for name in SOURCES:
        source, target = ROOT / name, folder / "grasp" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=unwanted)
        else:
            shutil.copy(source, target)
    return folder / "grasp"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copied_to(tmp_path)


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """Run a command that must succeed, without the CUDA module unless ``variables`` say otherwise; gives its output."""
    environment = {**os.environ, "GRASP_BUILD_CUDA": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **variables}
    environment = {name: value for name, value in environment.items() if value}
    result = subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def pip(*arguments: str | Path, cwd: Path, **variables: str) -> str:
    return run(sys.executable, "-m", "pip", *arguments, cwd=cwd, **variables)


def isolated(code: str, packages: Path, *arguments: str) -> str:
    """Run Python code with the packages in a folder, and without what is installed as editable here; its output."""
    paths = f"{packages}{os.pathsep}{sysconfig.get_path('purelib')}"
    return run(sys.executable, "-S", "-c", code, *arguments, cwd=packages, PYTHONPATH=paths)  # -S: no .pth files


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout from which pip has made a wheel, beside it, in an environment without torch."""
    folder = tmp_path_factory.mktemp("wheel")
    checkout = copied_to(folder)
    pip("wheel", ".", "--no-deps", "--quiet", "--wheel-dir", folder, cwd=checkout, CXX=quick_compiler(folder))
    return checkout


def quick_compiler(folder: Path) -> str:
    """A C++ compiler that leaves out the optimisation, which takes most of the time."""
    script = folder / "c++"
    script.write_text('#!/bin/sh\nexec c++ "$@" -O0\n')
    script.chmod(0o755)
    return f"env {script}"  # several words, as with ccache


@needs_compiler
def test_a_wheel_brings_kernels_header_and_library(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.parent.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert f"grasp_kernels/_cpu{sysconfig.get_config_var('EXT_SUFFIX')}" in names
    headers = {"grasp_kernels/include/lowrank.h", "grasp_kernels/lib/libgrasp_lowrank.a"}
    assert {*headers, "speedgate/plugin.py", "speedgate/py.typed"} <= set(names)
    assert not [name for name in names if "_cuda." in name or name.endswith((".cpp", ".cu"))]
    target = tmp_path / "installed"
    pip("install", "--no-deps", "--quiet", "--target", target, wheel, cwd=tmp_path)
    assert str(target) in isolated(USE, target)


@pytest.fixture(scope="module")
def editable(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment in which that checkout is installed as editable."""
    folder = tmp_path_factory.mktemp("editable")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    python = folder / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "ours.pth").write_text(sysconfig.get_path("purelib"))
    install = ("install", "--no-deps", "--no-build-isolation", "--ignore-installed", "--quiet")
    run(python, "-m", "pip", *install, "--editable", ".", cwd=built, CXX=quick_compiler(built.parent))
    return python


@needs_compiler
def test_an_editable_install_finds_the_kernels_and_rebuilds_only_what_changed(
    built: Path, editable: Path, tmp_path: Path
) -> None:
    assert str(built) in run(editable, "-c", USE, cwd=tmp_path, PYTHONPATH="")
    compiler, build = quick_compiler(built.parent), (editable, "setup.py", "build_ext", "--inplace")
    assert "no work to do" in run(*build, cwd=built, CXX=compiler)
    (built / "csrc" / "cpu" / "isa.cpp").touch()
    output = run(*build, cwd=built, CXX=compiler)
    assert "isa.o" in output
    assert "avx2.o -c" not in output
    assert "[3/3]" in output  # the object, the library, the module


@needs_compiler
def test_an_editable_install_is_found_from_the_parent_of_its_checkout(built: Path, editable: Path) -> None:
    code = "import grasp_kernels, grasp; print(grasp.GraspConfig.__module__, grasp.__file__, grasp_kernels.__file__)"
    package, kernels = built / "grasp" / "__init__.py", built / "kernels" / "grasp_kernels" / "__init__.py"
    output = run(editable, "-c", code, cwd=built.parent, PYTHONPATH="")
    assert output.split() == ["grasp.config", str(package), str(kernels)]
    command = run(editable.with_name("grasp"), "--version", cwd=built.parent, PYTHONPATH="")
    assert command == run(editable, "-m", "grasp", "--version", cwd=built.parent, PYTHONPATH="")


@needs_compiler
def test_an_editable_install_makes_nothing_else_importable(built: Path, editable: Path, tmp_path: Path) -> None:
    code = "import importlib.util, sys; print([name for name in sys.argv[1:] if importlib.util.find_spec(name)])"
    others = [path.stem for path in built.iterdir() if path.stem not in ("grasp", "grasp_autoload", "grasp_llm")]
    assert {"kernels", "packages", "setup"} <= set(others)
    taken = set(eval(run(editable, "-c", code, *others, cwd=tmp_path, PYTHONPATH="")))
    assert taken == set(eval(isolated(code, tmp_path, *others)))


@needs_compiler
def test_torch_is_imported_when_the_checkout_of_an_editable_install_is_gone(
    built: Path, editable: Path, tmp_path: Path
) -> None:
    code = """
import os, sys
os.dup2(1, 2)
sys.stdout.reconfigure(line_buffering=True)
import torch, transformers.modeling_utils
try:
    import grasp
except ModuleNotFoundError as error:
    print(error)
"""
    built.rename(built.with_name("gone"))
    try:
        *warnings, error = run(editable, "-c", code, cwd=tmp_path, PYTHONPATH="").splitlines()
    finally:
        built.with_name("gone").rename(built)
    assert len(warnings) <= 1
    assert error.startswith(f"{built}/grasp/__init__.py is gone")


def test_without_a_compiler_the_packages_install_all_the_same(checkout: Path, tmp_path: Path) -> None:
    command = (sys.executable, "setup.py", "--quiet", "build", "--build-lib", tmp_path / "built")
    output = run(*command, cwd=checkout, PATH=str(tmp_path / "empty"), CXX="")
    assert "grasp_kernels._cpu is left out" in output
    built = tmp_path / "built"
    assert (built / "grasp_kernels" / "include" / "lowrank.h").exists()
    assert not list(built.rglob("*.so"))
    assert "C++ compiler" in isolated(
        "from grasp_kernels import dispatch; print(dispatch.backend_missing('cpu'))", built
    )


def test_cuda_that_is_demanded_and_cannot_be_built_is_an_error(checkout: Path, tmp_path: Path) -> None:
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    for choice, message in (("1", "needs nvcc"), ("yes", "must be 0, 1 or auto, got 'yes'")):
        environment = {**os.environ, "PATH": str(tmp_path), "CUDACXX": "", "CUDA_HOME": "", "GRASP_BUILD_CUDA": choice}
        result = subprocess.run(command, cwd=checkout, env=environment, capture_output=True, text=True)
        assert result.returncode != 0
        assert message in result.stderr


@needs_compiler
def test_the_cpp_tests_pass(tmp_path: Path) -> None:
    """With the archive as it was built; `make sanitize` builds all of it for the sanitizers."""
    (archive,) = (ROOT / "kernels/grasp_kernels/lib").glob("*.a")
    options = ["-std=c++17", "-Wall", "-Wextra", "-pthread", "-ldl", "-o", tmp_path / "test"]
    run("c++", ROOT / "tests/csrc/test_lowrank.cpp", f"-I{ROOT / 'csrc'}", archive, *options, cwd=tmp_path)
    assert " 0 failures" in run(tmp_path / "test", cwd=tmp_path)
