from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from speedgate import baselines

pytest_plugins = ["pytester"]

RunPytest = Callable[..., tuple[int, str]]

# A project of somebody else. Its calls take no time but move the clock that the gate reads: verdicts are certain.
TEST = """
import sys
import types
import pytest
from speedgate import timing

now = 0.0
timing.time = types.SimpleNamespace(perf_counter=lambda: now)

def takes(seconds):
    def call(operand):
        global now
        now += seconds
        assert operand in ("first", "second")
    return call

@pytest.mark.parametrize("size", [1, 2])
def test_kernel(gate, size):
    assert gate.device == "cpu"
    kernel = takes(SECONDS[size])
    gate(kernel, takes(200e-6), ["first", "second"], label=f"kernel of size {size}", against="plain",
         measures={"bytes": lambda call: BYTES + (now == 0)})  # a cold call takes more
    assert "torch" not in sys.modules
"""


def write_project(folder: Path, seconds: dict[int, float], size: int = 0) -> None:
    (folder / "test_speed.py").write_text(TEST + f"\nSECONDS, BYTES = {seconds}, {size}\n")


def files(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*.json")}


@pytest.mark.slow
def test_a_foreign_project_guards_its_kernels(tmp_path: Path, run_pytest: RunPytest) -> None:
    write_project(tmp_path, {1: 100e-6, 2: 100e-6})
    code, output = run_pytest(tmp_path, "--gate=compare")
    assert code == 2, output
    assert "no baseline in" in output
    assert "record one with --gate=save" in output
    assert not (tmp_path / ".benchmarks").exists()

    code, output = run_pytest(tmp_path, "--gate=save")
    assert code == 0, output
    ((name, text),) = files(tmp_path).items()
    device = baselines.read(tmp_path / name).where
    folder = baselines.device_folder(Path(".benchmarks"), device)
    assert name.startswith(f"{folder}/")
    assert name.endswith("0001_baseline.json")
    extra = json.loads(text)["benchmarks"][0]["extra_info"]
    assert extra["calls_per_round"] == 10  # 1 ms of calls of 100 µs
    assert extra["gate"]["seconds"] == pytest.approx([100e-6] * 20)
    assert extra["gate"]["yardstick_seconds"] == pytest.approx([200e-6] * 20)

    code, output = run_pytest(tmp_path, "--gate=compare")
    assert code == 0, output
    assert "4 compared: 0 regression, 0 unclear, 0 better, 4 same; 0 lost, 0 new" in output

    write_project(tmp_path, {1: 100e-6, 2: 130e-6})
    summary = tmp_path / "summary.md"
    summary.write_text("before\n")
    options = ("--gate=compare", "--gate-markdown=comment.md")
    code, output = run_pytest(tmp_path, *options, GITHUB_STEP_SUMMARY=str(summary))
    assert code == 1, output
    assert "| ❌ regression | kernel of size 2 | time over plain | 0.500 | 0.650 (130.00 µs / 200.00 µs) | +30% |" in (
        summary.read_text()
    )
    assert summary.read_text() == "before\n" + (tmp_path / "comment.md").read_text()
    assert "regression: kernel of size 2: time over plain was 0.500, is 0.650: +30% (+30% to +30%)" in output
    assert "regression: kernel of size 1" not in output

    write_project(tmp_path, {1: 100e-6, 2: 100e-6}, size=1)
    code, output = run_pytest(tmp_path, "--gate=compare", GITHUB_STEP_SUMMARY="no/summary.md")
    assert code == 1, output
    assert "regression: kernel of size 1: bytes was 0, is 1: +inf%" in output
    assert "the table was not written: [Errno 2] No such file or directory: 'no/summary.md'" in output

    code, output = run_pytest(tmp_path, "--gate=compare", "--gate-threads=2")
    assert code == 2, output
    assert "threads: 1), this run on" in output
    assert files(tmp_path) == {name: text}

    write_project(tmp_path, {1: 100e-6, 2: 130e-6})
    code, output = run_pytest(tmp_path, "--gate=compare", "test_speed.py::test_kernel[1]")
    assert code == 0, output
    assert "1 entries of the baseline belong to tests that were not selected" in output

    write_project(tmp_path, {})
    code, output = run_pytest(tmp_path, "--gate=compare")
    assert code == 1, output
    assert "error: nothing was timed: the tests failed, " in output

    (tmp_path / name).write_text(text[:-9])
    code, output = run_pytest(tmp_path, "--gate=compare")
    assert code == 2, output
    assert "0001_baseline.json is damaged" in output
    assert files(tmp_path) == {name: text[:-9]}


@pytest.mark.slow
def test_profiled_turns_are_not_timed(tmp_path: Path, run_pytest: RunPytest) -> None:
    write_project(tmp_path, {1: 100e-6, 2: 100e-6})
    profile = ("--benchmark-cprofile=tottime", "--benchmark-cprofile-loops=70")
    code, output = run_pytest(tmp_path, "--gate=save", *profile)
    assert code == 0, output
    ((name, _),) = files(tmp_path).items()
    for entry in baselines.read(tmp_path / name).entries.values():
        assert len(entry.seconds) == len(entry.yardstick_seconds) == 20


@pytest.fixture
def project(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> pytest.Pytester:
    """A project whose kernel cannot be timed in a hurry: what is run here ends before, or is not timed."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    pytester.makeconftest('pytest_plugins = ["pytest_benchmark.plugin", "speedgate.plugin"]')
    pytester.makepyfile(
        "def test_kernel(gate):\n    calls = []\n    gate(calls.append, calls.append, [1, 2])\n"
        "    assert calls == [1, 1]\n"
    )
    return pytester


def test_without_timing_both_calls_are_made_once(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--benchmark-disable")
    result.assert_outcomes(passed=1)


def test_a_measure_must_have_a_name_of_its_own(project: pytest.Pytester) -> None:
    project.makepyfile("def test_kernel(gate):\n    gate(int, int, [1], measures={'time': lambda call: 1})\n")
    result = project.runpytest_inprocess("--benchmark-disable")
    result.stdout.fnmatch_lines(["*the gate itself measures 'time'; choose another name*"])


def test_a_failed_run_becomes_no_baseline(project: pytest.Pytester) -> None:
    project.makepyfile(test_wrong="def test_wrong(gate):\n    assert 1 == 2\n")
    result = project.runpytest_inprocess("--gate=save", "--gate-device=cpu", "test_wrong.py")
    assert result.ret == 1
    result.stdout.fnmatch_lines(["no baseline was saved: a test failed"])
    assert not files(project.path)


def test_a_run_that_timed_nothing_becomes_no_baseline(project: pytest.Pytester) -> None:
    project.makepyfile(test_plain="def test_plain():\n    pass\n")
    result = project.runpytest_inprocess("--gate=save", "--gate-device=cpu", "test_plain.py")
    assert result.ret == 2
    result.stdout.fnmatch_lines(["no baseline was saved: nothing was timed"])
    assert not files(project.path)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interruption", ["raise KeyboardInterrupt", "pytest.exit('enough')", "pytest.exit('enough', returncode=0)"]
)
def test_an_interrupted_run_becomes_no_baseline(interruption: str, tmp_path: Path, run_pytest: RunPytest) -> None:
    write_project(tmp_path, {1: 100e-6, 2: 100e-6})
    (tmp_path / "test_then.py").write_text(f"import pytest\n\ndef test_then():\n    {interruption}\n")
    code, output = run_pytest(tmp_path, "--gate=save", "test_speed.py", "test_then.py")
    assert code == pytest.ExitCode.INTERRUPTED, output
    assert "no baseline was saved: the run was interrupted" in output
    assert not files(tmp_path)


def test_a_self_test_that_timed_nothing_keeps_the_exit_code_of_a_failed_test(project: pytest.Pytester) -> None:
    project.makepyfile(test_wrong="def test_wrong(gate):\n    assert 1 == 2\n", test_plain="def test_plain(): pass")
    for file, code in (("test_wrong.py", 1), ("test_plain.py", 2)):
        result = project.runpytest_inprocess("--gate-selftest", "--gate-device=cpu", file)
        assert result.ret == code
        result.stdout.fnmatch_lines(["error: nothing was timed: *"])


def test_calls_are_not_timed_in_several_processes(project: pytest.Pytester) -> None:
    pytest.importorskip("xdist")
    result = project.runpytest_inprocess("--gate=save", "--gate-device=cpu", "-p", "xdist.plugin", "-n", "2")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "not in several processes of pytest-xdist; give -n 0" in result.stderr.str()


def test_a_list_of_the_tests_is_no_run(project: pytest.Pytester) -> None:
    assert project.runpytest_inprocess("--gate=save", "--gate-device=cpu", "--collect-only").ret == 0


@pytest.mark.parametrize("file", ["no/comment.md", "."])
def test_a_table_is_written_to_a_file_in_a_folder_that_exists(file: str, project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--gate=compare", f"--gate-markdown={file}")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "expected a file in a folder that exists" in result.stderr.str()


def test_baselines_are_files(project: pytest.Pytester) -> None:
    result = project.runpytest_inprocess("--gate=save", "--benchmark-storage=elasticsearch+http://host/index")
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    assert "--gate saves baselines in files" in result.stderr.str()
