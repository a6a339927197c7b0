from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPytest = Callable[..., tuple[int, str]]

# The module says which version it is, by its time. Calls take no time but move the clock that the gate reads.
TEST = """
import types
import pytest
import kernel
from speedgate import timing

now = 0.0
timing.time = types.SimpleNamespace(perf_counter=lambda: now)

def call(operand):
    global now
    now += kernel.SECONDS

@pytest.mark.parametrize("size", [1, 2])
def test_kernel(gate, size):
    gate(call, call, [None], label=f"kernel of size {size}", measures={"bytes": lambda call: kernel.BYTES})

def test_that_does_not_time():
    pass
"""

pytestmark = pytest.mark.slow


def git(folder: Path, *arguments: str) -> str:
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    return subprocess.run(["git", *author, *arguments], cwd=folder, check=True, capture_output=True, text=True).stdout


def write_version(folder: Path, seconds: float, size: int = 5) -> None:
    (folder / "src").mkdir(parents=True, exist_ok=True)
    (folder / "src" / "kernel.py").write_text(f"SECONDS, BYTES = {seconds}, {size}\n")
    (folder / "test_speed.py").write_text(TEST)
    (folder / "pytest.ini").write_text("[pytest]\npythonpath = src\naddopts = -p pytest_benchmark.plugin\n")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A repository of two commits: the second is slower."""
    folder = tmp_path / "project"
    for seconds in (1e-4, 1.3e-4):
        write_version(folder, seconds)
        if not (folder / ".git").exists():
            git(folder, "init", "--quiet")
        git(folder, "add", ".")
        git(folder, "commit", "--quiet", "-m", "a version")
    return folder


def test_a_revision_takes_turns_and_leaves_nothing_behind(project: Path, run_pytest: RunPytest) -> None:
    code, output = run_pytest(project, "--gate-against=HEAD~1", "--gate-markdown=result.md")
    assert code == 1, output
    assert "regression: kernel of size 2: time over HEAD~1 was 1.000, is 1.300: +30% (+30% to +30%)" in output
    assert "4 compared: 2 regression, 0 unclear, 0 better, 2 same; 0 lost, 0 new" in output
    assert "(130.00 µs / 100.00 µs)" in (project / "result.md").read_text()
    assert len(git(project, "worktree", "list").splitlines()) == 1


def test_a_folder_takes_turns_and_its_measures_are_compared(
    project: Path, tmp_path: Path, run_pytest: RunPytest
) -> None:
    write_version(tmp_path / "old", 1.3e-4, size=4)
    code, output = run_pytest(project, f"--gate-against={tmp_path / 'old'}", "-k", "1")
    assert code == 1, output
    assert "regression: kernel of size 1: bytes was 4, is 5: +25%" in output
    assert "2 compared: 1 regression, 0 unclear, 0 better, 1 same" in output


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        ("src/kernel.py", "import nothing_like_it", "No module named 'nothing_like_it'"),
        ("src/kernel.py", "SECONDS, BYTES = None, 5", "test_kernel[1] was not timed"),
        ("test_speed.py", TEST.replace("[1, 2]", "[1]"), "does not have the test test_speed.py::test_kernel[2]"),
    ],
    ids=["no import", "fails", "no test"],
)
def test_a_version_that_cannot_be_timed_is_named(
    file: str, text: str, complaint: str, project: Path, tmp_path: Path, run_pytest: RunPytest
) -> None:
    write_version(tmp_path / "old", 1e-4)
    (tmp_path / "old" / file).write_text(text)
    code, output = run_pytest(project, f"--gate-against={tmp_path / 'old'}")
    assert code == 2, output
    assert complaint in output


def test_a_process_that_imports_this_version_is_found_out(project: Path, tmp_path: Path, run_pytest: RunPytest) -> None:
    write_version(tmp_path / "old", 1e-4)
    (tmp_path / "old" / "pytest.ini").write_text(
        f"[pytest]\npythonpath = {project / 'src'}\naddopts = -p pytest_benchmark.plugin\n"
    )
    code, output = run_pytest(project, f"--gate-against={tmp_path / 'old'}")
    assert code == 2, output
    assert f"the module kernel comes from {project}/src/kernel.py, expected from {tmp_path}/old" in output
