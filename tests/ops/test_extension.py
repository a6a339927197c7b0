from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from grasp_kernels import Factors, extension, get_include
from grasp_kernels.dispatch import backend_missing

EXAMPLE = Path(__file__).parents[2] / "examples" / "lowrank_decode.cpp"


def test_a_module_that_was_not_built_names_the_requirements_of_its_build() -> None:
    reason = extension.module_missing("grasp_kernels._no_such_module", "a wizard")
    assert reason is not None
    assert "was not built" in reason
    assert "a wizard" in reason


def test_a_module_for_another_platform_names_both(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "_alien.cpython-311-sparc64-linux-gnu.so").touch()
    monkeypatch.setattr(extension, "__file__", str(tmp_path / "extension.py"))
    reason = extension.module_missing("grasp_kernels._alien", "a wizard")
    assert reason is not None
    assert "for cpython-311-sparc64-linux-gnu" in reason
    assert sysconfig.get_config_var("SOABI") in reason


def test_a_module_that_does_not_load_gives_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "half_built.py").write_text("raise ImportError('no libwizard.so')")
    monkeypatch.syspath_prepend(str(tmp_path))
    reason = extension.module_missing("half_built", "a wizard")
    assert reason is not None
    assert "no libwizard.so" in reason


def test_the_cpu_module_is_built_where_there_is_a_compiler() -> None:
    if sys.platform != "linux" or shutil.which("c++") is None:
        pytest.skip("there is no C++ compiler for Linux")
    assert backend_missing("cpu") is None


def test_matrices_that_the_kernels_cannot_read_in_place_are_copied() -> None:
    plain = torch.randn(4, 6)
    assert extension.in_place(plain) == (plain, 6)
    sliced = torch.randn(4, 9)[:, 2:8]
    matrix, stride = extension.in_place(sliced)
    assert matrix is sliced
    assert stride == 9
    for unreadable in (torch.randn(6, 4).mT, torch.randn(6).expand(4, 6), torch.randn(9).as_strided((4, 6), (1, 1))):
        matrix, stride = extension.in_place(unreadable)
        assert matrix.is_contiguous()
        assert torch.equal(matrix, unreadable)
        assert stride == 6


def test_pointers_keep_the_copies_that_they_point_to() -> None:
    U, s, Vh, y = torch.randn(3, 5).mT, torch.randn(6)[::2], torch.randn(3, 4), torch.empty(2, 5)
    group, (kept_U, kept_s, kept_Vh, kept_bias, order, *_) = extension.pointers(Factors(U, s, Vh, None), y, 4)
    assert kept_s is not None
    assert kept_bias is None
    assert kept_Vh is Vh
    assert group[:5] == (kept_U.data_ptr(), kept_s.data_ptr(), Vh.data_ptr(), 0, y.data_ptr())
    assert order is None
    assert group[5:] == (3, 4, 5, 5, 3, extension.DTYPE_CODES[torch.float32], 0, *[0] * 7)
    assert torch.equal(kept_U, U)
    assert torch.equal(kept_s, s)


@pytest.mark.slow
def test_another_program_links_the_kernels(tmp_path: Path) -> None:
    library = Path(extension.__file__).parent / "lib" / "libgrasp_lowrank.a"
    compiler = shutil.which("c++")
    if compiler is None or not library.exists():
        pytest.skip("there is no C++ compiler, or the kernels were not built")
    program = tmp_path / "lowrank_decode"
    command = [compiler, "-std=c++17", "-O1", str(EXAMPLE), f"-I{get_include()}", str(library), "-pthread"]
    subprocess.run([*command, "-o", str(program)], check=True)
    result = subprocess.run([str(program)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout
    assert "relative error" in result.stdout
