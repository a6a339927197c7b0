"""Write grasp_kernels as a package of Hugging Face's Kernel Hub: ``make kernel-package``; see docs/serve/kernel-hub.md.

It runs with the standard library alone. The package has one folder for each variant: Python with Triton kernels for any
machine, and with compiled modules for the machine's platform, as far as ``make build`` has built them.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
SOURCES = ROOT / "kernels" / "grasp_kernels"
NAME, MODULE = "grasp-kernels", "grasp_kernels"
MINIMUM = "0.17.0"  # of the library `kernels`; earlier ones look for a nested folder
# The modules use neither PyTorch's headers nor its libraries, so they run with every PyTorch that the Python does.
FRAMEWORK = "torch-stable-abi211"
CUDA_ARCHITECTURES = ["8.0", "9.0+PTX"]  # CUDA_FLAGS in setup.py
BUILD_TOML = """\
[general]
name = "{name}"
version = {version}
edition = 5
license = "Apache-2.0"
backends = ["cpu", "cuda"]

[torch-noarch]
pyext = ["py", "json"]
"""


@dataclass(frozen=True)
class Variant:
    """One build of the package; ``kernels`` chooses by the name of its folder."""

    folder: str
    backend: str
    modules: Sequence[str] = ()  # compiled ones
    architectures: Sequence[str] = field(default_factory=list)  # of GPUs; any if there are none


def variants(sources: Path) -> Iterator[Variant]:
    """The variants that can be made of a source folder."""
    yield Variant("torch-cpu", "cpu")
    yield Variant("torch-cuda", "cuda")
    here = f"{platform.machine()}-{platform.system().lower()}"
    built = {name for name in ("_cpu", "_cuda") if any(sources.glob(f"{name}.*.so"))}
    if "_cpu" in built:
        yield Variant(f"{FRAMEWORK}-cpu-{here}", "cpu", ["_cpu"])
    cuda = cuda_version()
    if built == {"_cpu", "_cuda"} and cuda is not None:
        yield Variant(f"{FRAMEWORK}-cu{cuda}-{here}", "cuda", ["_cpu", "_cuda"], CUDA_ARCHITECTURES)


def cuda_version() -> str | None:
    """The version of CUDA of the nvcc that built the module, found as setup.py finds it, such as ``"130"``."""
    home = os.environ.get("CUDA_HOME")
    names = (os.environ.get("CUDACXX"), home and f"{home}/bin/nvcc", "nvcc", "/usr/local/cuda/bin/nvcc")
    nvcc = next((found for name in names if name and (found := shutil.which(name))), None)
    if nvcc is None:
        return None
    output = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+)", output)
    return None if release is None else "".join(release.groups())


def contents(sources: Path, modules: Sequence[str]) -> dict[str, bytes]:
    """The files of a variant by their names: Python, tuned configurations, and compiled modules."""
    patterns = ["*.py", "*.json", *(f"{module}.*.so" for module in modules)]
    paths = sorted(path for pattern in patterns for path in sources.rglob(pattern))
    return {str(path.relative_to(sources)): path.read_bytes() for path in paths}


def version(files: dict[str, bytes]) -> int:
    """The version of the package: ``VERSION`` in layers.py."""
    found = re.search(rb"^VERSION = (\d+)", files["layers.py"], re.MULTILINE)
    if found is None:
        raise SystemExit("layers.py has no line `VERSION = <number>`")
    return int(found[1])


def identified(files: dict[str, bytes], backend: str) -> tuple[str, dict[str, bytes]]:
    """The identifier, from a hash of the files, and the files with it as the namespace of the ops."""
    digest = hashlib.sha256()
    for name, content in files.items():
        digest.update(f"{name} {len(content)} ".encode() + content)
    identifier = f"_{MODULE}_{backend}_{digest.hexdigest()[:10]}"
    ops = files["_ops.py"].decode().replace("grasp::", f"{identifier}::").replace("ops.grasp", f"ops.{identifier}")
    return identifier, files | {"_ops.py": ops.encode()}


def metadata(identifier: str, files: dict[str, bytes], variant: Variant) -> dict[str, object]:
    """The content of metadata.json, as docs/source/kernel-requirements.md of `kernels` describes it."""
    hashes = {name: base64.b64encode(hashlib.sha256(content).digest()).decode() for name, content in files.items()}
    backend: dict[str, object] = {"type": variant.backend}
    if variant.architectures:
        backend["archs"] = list(variant.architectures)
    return {
        "name": NAME,
        "id": identifier,
        "version": version(files),
        "kernels-minver": MINIMUM,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": backend,
        "digest": {"algorithm": "sha256", "files": hashes},
    }


def write(folder: Path, files: dict[str, bytes]) -> None:
    """Write files by their names."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_package(output: Path, sources: Path = SOURCES) -> list[str]:
    """Write the package in place of an earlier one; gives the folders of its variants.

    Raises:
        FileExistsError: if something else is there.
    """
    if output.exists():
        described = output / "build.toml"
        if any(output.iterdir()) and not (described.is_file() and f'name = "{NAME}"' in described.read_text()):
            raise FileExistsError(f"{output} is no earlier package of {NAME}; give a new folder")
        shutil.rmtree(output)
    folders: list[str] = []
    for variant in variants(sources):
        identifier, files = identified(contents(sources, variant.modules), variant.backend)
        description = json.dumps(metadata(identifier, files, variant), indent=2)
        write(output / "build" / variant.folder, files | {"metadata.json": description.encode()})
        folders.append(variant.folder)
    python = contents(sources, ())
    del python["_ops.py"]  # kernel-builder writes it
    write(output / "torch-ext" / MODULE, python)
    (output / "build.toml").write_text(BUILD_TOML.format(name=NAME, version=version(python)))
    shutil.copytree(HERE / "benchmarks", output / "benchmarks", ignore=shutil.ignore_patterns("__pycache__"))
    for path in (HERE / "README.md", ROOT / "LICENSE"):
        shutil.copy(path, output)
    return folders


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("output", type=Path, help="folder; an earlier package there is replaced")
    target = parser.parse_args().output
    print(f"{target}: {', '.join(write_package(target))}")
