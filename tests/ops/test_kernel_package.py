"""The package for the Kernel Hub loads as the library ``kernels`` loads it, without grasp."""

from __future__ import annotations

import ast
import base64
import hashlib
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import grasp_kernels
from grasp.model.lowrank_linear import LowRankLinear
from tests.command_line import ROOT
from tests.documents import run_python

HERE = ROOT / "packages" / "kernel-hub"
# Loads the variants in first/ and second/ as kernels.importer does, where nothing else of ours can be imported.
USE = """
import importlib.util, json, sys
from pathlib import Path
import torch

OURS = ("grasp", "grasp_kernels", "speedgate")

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OURS:
            raise ModuleNotFoundError(f"{name} is imported", name=name)

sys.meta_path.insert(0, Absent())
for name in [name for name in sys.modules if name.partition(".")[0] in OURS]:
    del sys.modules[name]
operands = torch.load("operands")
versions = []
for folder in (Path("first"), Path("second")):
    name = json.loads((folder / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    versions.append(module)
for module in versions:
    registered = getattr(torch.ops, module.__name__).lowrank_linear(*operands, None, None, None, None, "auto")
    names = [name for name in module.available_backends() if name in ("cpu", "reference")]
    outputs = {name: module.lowrank_linear(*operands, backend=name) for name in names}
    torch.save({"registered": registered, **outputs}, f"{module.__name__}.outputs")
"""


def load_writer() -> ModuleType:
    spec = importlib.util.spec_from_file_location("kernel_package", HERE / "kernel_package.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WRITER = load_writer()


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "package"
    WRITER.write_package(folder)
    return folder


def variant(package: Path) -> Path:
    """The one for this machine's CPU, with compiled kernels if they are built."""
    return next(iter(package.glob("build/torch-stable-abi*-cpu-*")), package / "build/torch-cpu")


def test_only_an_earlier_package_is_replaced(package: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is no earlier package of grasp-kernels; give a new folder"):
        WRITER.write_package(tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "mine"
    (package / "old").touch()
    WRITER.write_package(package)
    assert not (package / "old").exists()


def test_two_versions_in_one_process_compute_what_the_installed_ops_do(package: Path, tmp_path: Path) -> None:
    changed = tmp_path / "sources"
    shutil.copytree(WRITER.SOURCES, changed, ignore=shutil.ignore_patterns("__pycache__"))
    (changed / "reference.py").open("a").write("\n# another version\n")
    WRITER.write_package(tmp_path / "other", changed)
    shutil.copytree(variant(package), tmp_path / "first")
    shutil.copytree(variant(tmp_path / "other"), tmp_path / "second")
    operands = torch.randn(3, 40), torch.randn(24, 8), torch.rand(8), torch.randn(8, 40)
    torch.save(operands, tmp_path / "operands")
    run_python(USE, tmp_path)
    outputs = [torch.load(path) for path in tmp_path.glob("*.outputs")]
    assert len(outputs) == 2
    names = {"cpu", "reference"} & set(grasp_kernels.available_backends())
    expected = {name: grasp_kernels.lowrank_linear(*operands, backend=name) for name in names}
    expected["registered"] = grasp_kernels.lowrank_linear(*operands)
    for output in outputs:
        assert output.keys() == expected.keys()
        assert [name for name in expected if not torch.equal(output[name], expected[name])] == []


def test_the_metadata_names_the_ops_and_every_file(package: Path) -> None:
    folders = list((package / "build").iterdir())
    assert {"torch-cpu", "torch-cuda"} <= {folder.name for folder in folders}
    for folder in folders:
        metadata = json.loads((folder / "metadata.json").read_text())
        assert f"torch.ops.{metadata['id']}\n" in (folder / "_ops.py").read_text()
        assert metadata["version"] == grasp_kernels.layers.VERSION
        files = [path for path in folder.rglob("*") if path.is_file() and path.name != "metadata.json"]
        hashes = {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest() for path in files}
        expected = {name: base64.b64encode(digest).decode() for name, digest in hashes.items()}
        assert metadata["digest"]["files"] == expected


def test_the_package_imports_only_itself_torch_triton_and_the_standard_library(package: Path) -> None:
    allowed = {*sys.stdlib_module_names, "torch", "triton"}
    for path in variant(package).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert {name.partition(".")[0] for name in names} <= allowed, f"{path}: {names}"


def test_its_layer_computes_what_ours_does_and_refuses_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    x, forward = torch.randn(2, 12), grasp_kernels.layers.LowRankLinear.forward
    for layer in (LowRankLinear(12, 8, 3), LowRankLinear(12, 8, 3, bias=False, pivoted=True)):
        assert torch.equal(forward(layer, x), layer(x))
    monkeypatch.setattr(LowRankLinear, "kernel_version", 7)
    with pytest.raises(RuntimeError, match="version 7"):
        forward(layer, x)
