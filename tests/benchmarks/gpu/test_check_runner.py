from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from benchmarks.gpu import check_runner
from benchmarks.gpu.check_runner import Journal, Line, Task, read_lines, run_tasks
from benchmarks.gpu.gpu_state import REASONS, GpuState, parse, read_state, summary

PLANTED = "tests.benchmarks.gpu.planted"
FAULTS = {  # by plant: word of its reason
    "illegal access": "AcceleratorError: CUDA error: an illegal memory access",
    "out of memory": "OutOfMemoryError: CUDA out of memory",
    "no memory": "MemoryError",
    "exit": "exit code 3",
    "segmentation fault": "SIGSEGV",
}


def planted(*providers: str, limit_s: float = 60) -> Task:
    return Task(", ".join(providers), f"{PLANTED}:task", {"providers": providers}, limit_s)


def run(path: Path, *tasks: Task, seconds: float = 100) -> list[Line]:
    run_tasks(tasks, Journal.open(path), time.monotonic() + seconds)
    return read_lines(path)


def of_kind(lines: list[Line], kind: str) -> list[Line]:
    return [line for line in lines if line["kind"] == kind]


def test_nothing_that_a_task_does_costs_the_results_of_another(tmp_path: Path) -> None:
    tasks = [planted("good"), *(planted(name, "printing") for name in FAULTS)]
    tasks += [planted("hang", "printing", "good", limit_s=1), planted("printing")]
    lines = run(tmp_path / "lines", *tasks)
    assert {line["task"] for line in of_kind(lines, "end") if line["status"] == "done"} == {task.key for task in tasks}
    results = {(line["task"], line["provider"]) for line in of_kind(lines, "result")}
    good = {(task.key, name) for task in tasks for name in task.arguments["providers"] if name in ("good", "printing")}
    assert results == good
    faults = {line["provider"]: line["reason"] for line in of_kind(lines, "fault")}
    assert set(faults) == {*FAULTS, "hang"}
    for name, word in FAULTS.items():
        assert word in faults[name]
    assert faults["hang"].startswith("not done after")


def test_a_provider_that_hung_once_or_crashed_twice_is_left_out_from_then_on(tmp_path: Path) -> None:
    tasks = [
        planted("hang", "good", limit_s=1),
        planted("hang", "printing"),
        planted("exit", "good"),
        planted("good", "exit"),
        planted("exit", "printing"),
    ]
    lines = run(tmp_path / "lines", *tasks)
    assert [line["provider"] for line in of_kind(lines, "fault")] == ["hang", "exit", "exit"]
    assert of_kind(lines, "start")[-1]["without"] == ["exit", "hang"]


def test_a_task_that_fails_outside_its_providers_fails_once(tmp_path: Path) -> None:
    broken = Task("broken", f"{PLANTED}:task", {}, 60)
    lines = run(tmp_path / "lines", broken, planted("good"))
    first, second = of_kind(lines, "end")
    assert first["status"] == "failed"
    assert "TypeError" in first["reason"]
    assert second["status"] == "done"
    assert len(of_kind(lines, "start")) == 2


def test_an_interrupted_run_continues_where_its_file_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_runner, "LEAST_SECONDS", 0.1)
    path, wait = tmp_path / "lines", tmp_path / "wait"
    wait.touch()
    tasks = [planted("good"), Task("slow", f"{PLANTED}:slow", {"folder": str(tmp_path)}, 60), planted("printing")]
    run(path, planted("good"))
    lines = run(path, *tasks, seconds=3)
    assert [line["task"] for line in of_kind(lines, "end")] == ["good"]
    assert of_kind(lines, "fault") == []
    with path.open("a") as file:
        file.write('{"kind": "resu')  # the machine lost its power
    wait.unlink()
    lines = run(path, *tasks)
    assert [line["task"] for line in of_kind(lines, "end")] == ["good", "slow", "printing"]
    assert [line["provider"] for line in of_kind(lines, "result")] == ["good", "slow", "printing"]
    assert run(path, *tasks) == lines


def test_a_task_that_took_the_check_with_it_twice_is_given_up(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text('{"kind": "start", "task": "good", "without": []}\n' * 2)
    lines = run(path, planted("good"))
    assert of_kind(lines, "result") == []
    assert "ended 2 times while it ran" in of_kind(lines, "end")[0]["reason"]


def test_every_line_is_on_the_disk_before_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synchronised: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda _: synchronised.append((tmp_path / "lines").stat().st_size))
    journal = Journal.open(tmp_path / "lines")
    journal.write(kind="result", task="a")
    journal.write(kind="result", task="b")
    sizes = [len(json.dumps({"kind": "result", "task": name})) + 1 for name in "ab"]
    assert synchronised == [sizes[0], sum(sizes)]


def test_the_state_of_the_gpu_is_kept_with_the_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check_runner, "SAMPLE_EVERY", 0.001)  # shorter than the start of a process
    path, readings = tmp_path / "lines", iter(range(1, 10_000))
    state = lambda: GpuState(1000.0 + next(readings), 2619.0, 350.0, 60.0, 0x4)  # noqa: E731
    run_tasks([planted("good")], Journal.open(path), time.monotonic() + 60, state=state)
    (line,) = of_kind(read_lines(path), "state")
    assert line["gpu"]["throttle_reasons"] == ["power cap"]
    assert line["gpu"]["sm_mhz"][0] == 1001.0


def test_readings_are_summed_up() -> None:
    states = [parse("1980, 2619, 340.5, 55, 0x0000000000000000"), parse("1200, 2619, 702.1, 71, 0x0000000000000044")]
    assert summary([state for state in states if state is not None]) == {
        "sm_mhz": [1200.0, 1590.0, 1980.0],
        "memory_mhz": 2619.0,
        "watts": 702.1,
        "celsius": 71.0,
        "throttle_reasons": ["power cap", "thermal, hardware"],
        "readings": 2,
    }
    assert parse("[N/A], 2619, 340.5, 55, 0x0") is None
    assert parse("No devices were found") is None
    assert summary([]) is None
    assert len(REASONS) == 9


def test_without_nvidia_smi_there_is_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert read_state() is None


@pytest.mark.parametrize("name", ["clocks_event_reasons.active", "clocks_throttle_reasons.active"])
def test_drivers_name_the_reasons_in_two_ways(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f'#!/bin/sh\ncase "$*" in *{name}*) echo 1980, 2619, 340.5, 55, 0x4;; *) exit 2;; esac\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    assert read_state() == GpuState(1980.0, 2619.0, 340.5, 55.0, 4)
