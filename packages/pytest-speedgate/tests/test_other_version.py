from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

RunPytest = Callable[..., tuple[int, str]]
WriteVersion = Callable[..., None]

pytestmark = pytest.mark.slow


def test_a_revision_takes_turns_and_leaves_nothing_behind(project: Path, run_pytest: RunPytest) -> None:
    code, output = run_pytest(project, "--gate-against=HEAD~1", "--gate-markdown=result.md")
    assert code == 1, output
    assert "regression: kernel of size 2: time over HEAD~1 was 1.000, is 1.300: +30% (+30% to +30%)" in output
    assert "4 compared: 2 regression, 0 unclear, 0 better, 2 same; 0 lost, 0 new" in output
    assert "(130.00 µs / 100.00 µs)" in (project / "result.md").read_text()
    assert len(list((project / ".git").glob("worktrees/*"))) == 0


def test_a_folder_takes_turns_and_its_measures_are_compared(
    project: Path, tmp_path: Path, write_version: WriteVersion, run_pytest: RunPytest
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
        (
            "test_speed.py",
            "def test_kernel(gate): pass",
            "does not have the test test_speed.py::test_kernel[1] and 1 more",
        ),
    ],
    ids=["no import", "fails", "no test"],
)
def test_a_version_that_cannot_be_timed_is_named(
    file: str,
    text: str,
    complaint: str,
    project: Path,
    tmp_path: Path,
    write_version: WriteVersion,
    run_pytest: RunPytest,
) -> None:
    write_version(tmp_path / "old", 1e-4)
    (tmp_path / "old" / file).write_text(text)
    code, output = run_pytest(project, f"--gate-against={tmp_path / 'old'}")
    assert code == 2, output
    assert complaint in output


def test_a_process_that_imports_this_version_is_found_out(
    project: Path, tmp_path: Path, write_version: WriteVersion, run_pytest: RunPytest
) -> None:
    write_version(tmp_path / "old", 1e-4)
    (tmp_path / "old" / "pytest.ini").write_text(f"[pytest]\npythonpath = {project / 'src'}\n")
    code, output = run_pytest(project, f"--gate-against={tmp_path / 'old'}")
    assert code == 2, output
    complaint = f"the module kernel comes from {project}/src/kernel.py, expected from {tmp_path}/old"
    assert complaint in output
    (tmp_path / "link").symlink_to(project)
    through = (f"--rootdir={tmp_path / 'link'}", str(tmp_path / "link" / "test_speed.py"))
    code, output = run_pytest(tmp_path, f"--gate-against={tmp_path / 'old'}", *through)
    assert (code, complaint in output) == (2, True), output


def test_profiled_turns_are_not_timed_in_either_process(project: Path, run_pytest: RunPytest) -> None:
    with (project / "pytest.ini").open("a") as file:
        file.write("addopts = --benchmark-cprofile=tottime --benchmark-cprofile-loops=2\n")
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "-qam", "profile"], cwd=project, check=True
    )
    code, output = run_pytest(project, "--gate-against=HEAD")
    assert code == 0, output
    assert "4 compared: 0 regression, 0 unclear, 0 better, 4 same" in output


def test_a_test_outside_the_root_folder_is_named(project: Path, tmp_path: Path, run_pytest: RunPytest) -> None:
    test = (project / "test_speed.py").rename(tmp_path / "test_speed.py")
    code, output = run_pytest(project, "--gate-against=HEAD", f"--rootdir={project}", "-c", "pytest.ini", str(test))
    assert code == 2, output
    assert f"{test} is outside the root folder {project}; give the folder" in output
    assert "INTERNALERROR" not in output


def test_a_run_that_times_nothing_compares_nothing(project: Path, run_pytest: RunPytest) -> None:
    code, output = run_pytest(project, "--gate-against=HEAD", "-k", "does_not_time")
    assert (code, "error: nothing was timed: " in output) == (2, True), output
