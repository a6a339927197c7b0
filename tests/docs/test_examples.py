"""Every script of examples/ runs; the C++ program is a test of tests/ops/test_extension.py."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.command_line import ROOT, TEXT, save_tiny_model
from tests.documents import run_python

pytestmark = pytest.mark.slow

EXAMPLES = ROOT / "examples"


def run_script(folder: Path, script: str, *arguments: object) -> str:
    code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
    return run_python(code, folder, EXAMPLES / script, *arguments)


def test_every_script_is_run_here() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    assert all(f'"{script.name}"' in source for script in EXAMPLES.glob("*.py"))


def test_compress(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(TEXT)
    options = ["--layers", 1, "--samples", 2, "--tokens", 64, "--text", tmp_path / "text.txt"]
    printed = run_script(tmp_path, "compress.py", tmp_path / "tiny", tmp_path / "small", *options)
    assert "of the parameters removed" in printed
    assert (tmp_path / "small" / "model.safetensors").is_file()


def test_kernels_alone(tmp_path: Path) -> None:
    printed = run_script(tmp_path, "kernels_alone.py")
    assert "chosen" in printed
    source = (EXAMPLES / "kernels_alone.py").read_text(encoding="utf-8")
    assert not re.search(r"^(from|import) grasp\b", source, re.MULTILINE)


def test_embed_in_your_model(tmp_path: Path) -> None:
    printed = run_script(tmp_path, "embed_in_your_model.py")
    losses = [float(line.split("loss ")[1].split(",")[0]) for line in printed.splitlines() if "loss " in line]
    dense, truncated, tuned = losses
    assert dense < truncated
    assert tuned < truncated


def test_guard_a_kernel_in_ci(tmp_path: Path) -> None:
    code = "import runpy; runpy.run_module('pytest', run_name='__main__')"
    options = ["-q", "-p", "speedgate.plugin", EXAMPLES / "guard_a_kernel_in_ci.py", "--rootdir", tmp_path]
    storage = f"--benchmark-storage={tmp_path / 'baselines'}"
    assert "2 passed" in run_python(code, tmp_path, *options, "--gate=save", storage)
    # So wide a threshold cannot be passed by noise: the test is of the example, not of the gate.
    assert "2 passed" in run_python(code, tmp_path, *options, "--gate=compare", "--gate-threshold=20", storage)
