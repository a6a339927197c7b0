"""Use the package in an environment that has torch and kernels: without grasp, and with it if it is installed.

python -I packages/kernel-hub/check.py PACKAGE
"""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import torch
from kernels._rust import Build, Digest, Metadata
from torch import Tensor

from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    replace_kernel_forward_from_hub,
    use_kernel_mapping,
)

HERE = Path(__file__).parent


def check_metadata(package: Path) -> None:
    """The library reads the metadata of every variant, and its hashes are those of the files."""
    build = Build.open(package)
    folders = sorted((package / "build").iterdir())
    for folder in folders:
        metadata = Metadata.read_from_file(folder / "metadata.json")
        assert metadata.digest is not None
        metadata.digest.validate(Digest.hash_variant(metadata.digest.algorithm, folder))
    print(f"{len(folders)} variants for {build.general.backends}: {', '.join(folder.name for folder in folders)}")


def arguments() -> tuple[Tensor, Tensor, None, Tensor]:
    """Those of ``lowrank_linear``."""
    torch.manual_seed(0)
    return torch.randn(3, 40), torch.randn(24, 8), None, torch.randn(8, 40)


def check_ops(kernel: ModuleType) -> None:
    """An op computes what it says, by the compiled kernel and by Triton's, with gradients and in a compiled graph."""
    x, U, _, Vh = arguments()
    expected = x @ Vh.T @ U.T
    for name in ("cpu", "triton"):  # check.sh has Triton's interpreted
        torch.testing.assert_close(kernel.lowrank_linear(x, U, None, Vh, backend=name), expected)
    compiled = torch.compile(kernel.lowrank_linear, fullgraph=True, backend="aot_eager")
    x.requires_grad_()
    y = compiled(x, U, None, Vh)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (torch.ones_like(expected) @ U @ Vh))
    assert torch.ops.__dict__.get("grasp") is None, "the package uses the installed ops' namespace"


def check_two_versions(kernel: ModuleType) -> None:
    """A changed package is another one, beside the first in the same process."""
    spec = importlib.util.spec_from_file_location("kernel_package", HERE / "kernel_package.py")
    assert spec is not None
    assert spec.loader is not None
    writer = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = writer
    spec.loader.exec_module(writer)
    with TemporaryDirectory() as folder:
        sources = Path(folder) / "sources"
        shutil.copytree(writer.SOURCES, sources, ignore=shutil.ignore_patterns("__pycache__"))
        with (sources / "ops.py").open("a") as file:
            file.write("\nCHANGED = True\n")
        writer.write_package(Path(folder) / "package", sources)
        other = get_local_kernel(Path(folder) / "package")
        assert other.__name__ != kernel.__name__
        assert other.ops.CHANGED
        assert not hasattr(kernel.ops, "CHANGED")
        for name in ("cpu", "reference"):
            results = [version.lowrank_linear(*arguments(), backend=name) for version in (kernel, other)]
            assert torch.equal(*results)
        check_ops(other)
        check_ops(kernel)


def check_with_grasp(kernel: ModuleType, package: Path) -> None:
    """The installed ops give the same numbers, and ``kernelize`` swaps the forward of grasp's layer."""
    import grasp_kernels
    from grasp import LowRankLinear

    for name in ("cpu", "reference"):
        ours, theirs = (module.lowrank_linear(*arguments(), backend=name) for module in (grasp_kernels, kernel))
        assert torch.equal(ours, theirs)
    replace_kernel_forward_from_hub(LowRankLinear, "LowRankLinear")
    model = torch.nn.Sequential(LowRankLinear(40, 24, 8), LowRankLinear(24, 40, 8, pivoted=True)).requires_grad_(False)
    x = arguments()[0]
    expected = model(x)
    mapping = {"LowRankLinear": {"cpu": LocalLayerRepository(package, layer_name="LowRankLinear")}}
    for mode in (Mode.INFERENCE, Mode.TRAINING, Mode.INFERENCE | Mode.TORCH_COMPILE):
        with use_kernel_mapping(mapping):
            kernelize(model, mode=mode, use_fallback=False)
        assert model[0].forward.__func__.__module__ == f"{kernel.__name__}.layers"
        assert torch.equal(model(x), expected)
    LowRankLinear.kernel_version += 1
    refusal = ""
    try:
        model(x)
    except RuntimeError as error:
        refusal = str(error)
    assert f"version {LowRankLinear.kernel_version}" in refusal, "a package of another version runs"
    print("kernelize: the same numbers, and another version is refused")


if __name__ == "__main__":
    path = Path(sys.argv[1])
    check_metadata(path)
    loaded = get_local_kernel(path)
    print(f"loaded {loaded.__name__}")
    if importlib.util.find_spec("grasp") is None:
        check_ops(loaded)
        check_two_versions(loaded)
    else:
        check_with_grasp(loaded, path)
