from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from grasp.bench import ops
from grasp.bench.records import NotMeasured
from grasp.workflows import evaluation_results
from tests.command_line import RunMain, assert_refused

FILES = [
    ("evaluate", "missing-model"),
    ("bench", "ops", "--model", "missing-model"),
    ("bench", "model", "missing-model"),
    ("bench", "serve", "missing-model"),
    ("bench", "costs", "missing-model"),
    ("report", "missing-folder"),
]
FOLDERS = [
    ("compress", "missing-model"),
    ("recover", "."),
    ("convert", ".", "--to", "pivoted"),
    ("quantize", "missing-model"),
    ("demo",),
]
SPECIAL = ("/proc/1/new", "/dev/full", "/dev/null")


def full_disk(*arguments: object, **options: object) -> NoReturn:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("command", [*FILES, *FOLDERS], ids=" ".join)
def test_every_command_refuses_a_bad_output_before_any_work(
    command: tuple[str, ...], tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("mine")
    good = tmp_path / "new"
    wrong_kind = tmp_path if command in FILES else tmp_path / "file"
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    names = ("file/new", "loop", "pipe", "x" * 240, "é" * 120, "x" * 300)
    for output in (wrong_kind, *(tmp_path / name for name in names), *map(Path, SPECIAL)):
        assert_refused(main(*command, "-o", output), "output", output.name)
    with monkeypatch.context() as patch:
        patch.setattr("os.fsync", full_disk)
        assert_refused(main(*command, "-o", good), str(good), "No space left on device")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "loop", "pipe"]
    if command != ("demo",):  # a good output is no reason
        assert str(good) not in main(*command, "-o", good).err


def test_an_evaluation_that_cannot_be_written_is_printed(
    model: Path, text: Path, tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "results.json"
    replace = evaluation_results.write_whole
    monkeypatch.setattr("os.link", full_disk)
    monkeypatch.setattr(Path, "rename", full_disk)
    outcome = main("evaluate", model, "--text", text, "--window", 64, "--json", "-o", output)
    assert outcome.code == 2
    assert outcome.err.splitlines()[-1].startswith(f"error: writing {output} failed")
    assert json.loads(outcome.out)["result"]["tokens"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text.txt"]
    monkeypatch.undo()

    def write(target: Path, content: str, **options: object) -> None:
        target.write_text("somebody's")
        replace(target, content, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(evaluation_results, "write_whole", write)
    outcome = main("evaluate", model, "--text", text, "--window", 64, "--json", "-o", output)
    assert (outcome.code, output.read_text()) == (2, "somebody's")
    assert str(tmp_path / "results-2.json") in outcome.err
    assert (tmp_path / "results-2.json").read_text() == outcome.out


def test_benchmark_results_that_cannot_be_appended_are_printed(
    tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, record = tmp_path / "ops.jsonl", NotMeasured("ops", "cuda", "no CUDA device")
    monkeypatch.setattr(ops, "run", lambda request, progress: [([record], {}, 1)] * 2)
    assert main("bench", "ops", "-o", output, "--json").code == 0
    before = output.read_text()
    assert before.count("\n") == 2
    sync, calls = os.fsync, iter(range(100))
    monkeypatch.setattr("os.fsync", lambda file: full_disk() if next(calls) == 3 else sync(file))  # the second record
    outcome = main("bench", "ops", "-o", output, "--json")
    assert outcome.code == 2
    assert f"cannot be appended to {output}" in outcome.err.splitlines()[-1]
    assert json.loads(outcome.out)["results"] == [record.to_dict()] * 2
    assert output.read_text() == before + before[: len(before) // 2]


def test_what_was_measured_before_an_interruption_is_printed_and_saved(
    tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = NotMeasured("ops", "cuda", "no CUDA device")

    def interrupted(request: object, progress: object) -> Iterator[tuple[list[NotMeasured], dict[str, int], int]]:
        yield [record], {}, 1
        raise KeyboardInterrupt

    monkeypatch.setattr(ops, "run", interrupted)
    outcome = main("bench", "ops")
    assert (outcome.code, "no CUDA device" in outcome.out) == (130, True)

    def closed(records: object) -> NoReturn:
        raise BrokenPipeError

    monkeypatch.setattr("grasp.cli.bench_tables.show_results", closed)
    assert main("bench", "ops", "-o", tmp_path / "ops.jsonl").code != 0
    assert json.loads((tmp_path / "ops.jsonl").read_text()) == record.to_dict()
