"""The properties of an installed wheel of grasp-llm that its users rely on; run by the environment's Python with -I."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

SECONDS = 0.3  # for `import grasp`
HEAVY = ("torch", "transformers", "numpy")
IMPORT = f"""
import sys, time
start = time.perf_counter()
import grasp
print(time.perf_counter() - start, *(name for name in {HEAVY} if name in sys.modules))
"""
INSTRUCTION_SETS = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


def check_import() -> None:
    """``import grasp`` is fast, and leaves the libraries to the first use."""
    run = subprocess.run([sys.executable, "-I", "-c", IMPORT], capture_output=True, text=True, check=True)
    seconds, *loaded = run.stdout.split()
    assert not loaded, f"import grasp loads {loaded}"
    assert float(seconds) <= SECONDS, f"import grasp takes {float(seconds):.2f} s, expected at most {SECONDS}"
    print(f"import grasp: {float(seconds) * 1000:.1f} ms")


def check_kernels() -> None:
    """The CPU kernels are in the wheel, for all instruction sets, and run."""
    import torch

    import grasp_kernels

    folder = Path(grasp_kernels.__file__).parent
    library = (folder / "lib" / "libgrasp_lowrank.a").read_bytes()
    missing = [name for name in INSTRUCTION_SETS if f"{name}.o/".encode() not in library]
    assert not missing, f"the compiler of this wheel knew no {missing}"
    x, U, Vh = torch.randn(3, 40), torch.randn(24, 8), torch.randn(8, 40)
    torch.testing.assert_close(grasp_kernels.lowrank_linear(x, U, None, Vh, backend="cpu"), x @ Vh.T @ U.T)
    modules = ", ".join(f"{path.name} {path.stat().st_size / 1e6:.1f} MB" for path in sorted(folder.glob("*.so")))
    print(f"kernels: {modules}")


def check_size() -> None:
    """The files are those of the wheel, not of a checkout."""
    import grasp
    import grasp_kernels

    site = Path(sysconfig.get_path("purelib"))
    packages = [Path(module.__file__ or "").parent for module in (grasp, grasp_kernels)]
    assert all(site in package.parents for package in packages), f"{packages} are not in {site}"
    size = sum(path.stat().st_size for package in packages for path in package.rglob("*") if path.suffix != ".pyc")
    print(f"grasp-llm {version('grasp-llm')}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    check_import()
    check_size()
    check_kernels()
