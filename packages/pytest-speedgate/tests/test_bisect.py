from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

WriteVersion = Callable[..., None]

pytestmark = pytest.mark.slow


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    command = ["git", *author, *arguments]
    return subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()


def bisect(folder: Path, environment: dict[str, str], *arguments: str) -> tuple[int, str]:
    plugins = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "pytest_benchmark.plugin,speedgate.plugin"}
    command = [sys.executable, "-m", "speedgate", "bisect", *arguments]
    done = subprocess.run(command, cwd=folder, env={**environment, **plugins}, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_commit_that_made_it_slower_is_found_in_builds_of_all_versions(
    tmp_path: Path, write_version: WriteVersion, environment: dict[str, str]
) -> None:
    git(tmp_path, "init", "--quiet")
    for number, seconds in enumerate((1e-4, 1.05e-4, 1.3e-4, 1.32e-4)):
        write_version(tmp_path, seconds, 5 + 4 * number)  # more bytes each time, which is not searched for
        (tmp_path / "src" / "kernel.py").rename(tmp_path / "kernel.source")  # to be built
        git(tmp_path, "add", ".")
        git(tmp_path, "commit", "--quiet", "-m", f"version {number}")
    search = ("HEAD~3", "HEAD", "test_speed.py::test_kernel[1]", "--build")
    code, output = bisect(tmp_path, environment, *search, "mkdir -p src; cp kernel.source src/kernel.py")
    assert code == 0, output
    culprit = git(tmp_path, "log", "-1", "--format=%h", "HEAD~1")
    assert output == (
        f"{culprit} version 2: kernel of size 1: time over HEAD~3 is 1.300 (+30% to +30%), "
        "one commit before 1.050 (+5% to +5%)\n"
    )
    assert git(tmp_path, "status", "--short") == ""
    code, output = bisect(
        tmp_path, environment, "HEAD~3", "HEAD", "test_speed.py", "--build", "echo no compiler; false"
    )
    assert (code, "HEAD~3 was not built" in output, "no compiler" in output) == (2, True, True)


def test_a_revision_is_no_folder_of_the_same_name(project: Path, environment: dict[str, str]) -> None:
    git(project, "tag", "release", "HEAD~1")
    (project / "release").mkdir()
    code, output = bisect(project, environment, "release", "HEAD", "test_speed.py")
    assert code == 0, output
    assert ": kernel of size 1: time over release is 1.300 (+30% to +30%), one commit before 1.000" in output


def test_a_version_that_is_not_slower_has_no_culprit(project: Path, environment: dict[str, str]) -> None:
    code, output = bisect(project, environment, "HEAD~1", "HEAD", "test_speed.py", "--threshold=0.5")
    assert code == 2, output
    assert (
        "error: HEAD is not slower than HEAD~1: same: kernel of size 1: time over HEAD~1 was 1.000, is 1.300" in output
    )
