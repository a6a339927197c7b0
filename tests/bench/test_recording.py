from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from grasp.bench.recorded import RecordedCall, Recording
from grasp.bench.recording import read_recording, record_command, record_workload
from grasp.errors import GraspError, ResultsError
from tests.command_line import environment

GENERATE = """
import os, signal, sys, torch
from grasp.bench.providers import truncate_
from tests.tiny_models import tiny_batches, tiny_model

torch.set_num_threads(1)
model = tiny_model("llama")
truncate_(model, [0, 2], 0.5)
child = os.fork()
model.generate(tiny_batches(1, length=5)[0], max_new_tokens=4 - 2 * (child == 0), eos_token_id=None, pad_token_id=0)
if child == 0:
    os.kill(os.getpid(), signal.SIGKILL)
os.waitpid(child, 0)
signal.signal(signal.SIGINT, signal.SIG_DFL)
os.kill(os.getpid(), signal.SIGINT)
"""
CALL = RecordedCall("lowrank_linear_grouped", "24x16r4+24x8r2", "pivoted+factored", 3, "float32", "cpu", False, 7)


def written(path: Path, *calls: RecordedCall, **changes: Any) -> Path:
    path.write_text(json.dumps({**Recording(1, calls).to_dict(), **changes}))
    return path


def test_a_killed_and_an_interrupted_process_have_all_their_calls_in_one_file(tmp_path: Path) -> None:
    code, recording = record_command([sys.executable, "-c", GENERATE], tmp_path / "w.json", environment())
    assert code == 128 + signal.SIGINT
    assert read_recording(tmp_path / "w.json") == recording
    assert recording.processes == 2
    counts: dict[int, int] = {}
    for call in recording.calls:
        assert (call.op, call.form, call.dtype, call.device) == ("lowrank_linear", "factored", "float32", "cpu")
        counts[call.rows] = counts.get(call.rows, 0) + call.count
    linears, sequences = 2 * 7, 2  # of two low-rank layers
    assert counts == {sequences * 5: 2 * linears, sequences: (3 + 1) * linears}  # prompts; all tokens but the first
    assert {(call.shape, call.count) for call in recording.calls if call.rows == sequences} == {
        ("32x32r8", 4 * 2 * 2), ("32x16r5", 4 * 2 * 2), ("32x48r9", 4 * 2 * 2), ("48x32r9", 4 * 2)
    }  # fmt: skip


def test_signals_to_the_recording_process_reach_the_command(tmp_path: Path) -> None:
    command, before = ["sh", "-c", "kill -INT $PPID; kill -TERM $PPID; exec sleep 60"], signal.getsignal(signal.SIGINT)
    code, recording = record_command(command, tmp_path / "w.json", os.environ)
    assert (code, recording.calls) == (128 + signal.SIGTERM, ())
    assert signal.getsignal(signal.SIGINT) is before


def test_a_signal_that_is_ignored_stays_so_for_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        code, _ = record_command(["sh", "-c", "kill -HUP $$; exit 3"], tmp_path / "w.json", os.environ)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert code == 3


def test_a_block_that_calls_nothing_or_raises(tmp_path: Path) -> None:
    with pytest.raises(GraspError, match="no low-rank op"), record_workload(tmp_path / "w.json"):
        pass
    with pytest.raises(ZeroDivisionError), record_workload(tmp_path / "w.json"):
        _ = 1 / 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "code", "message"),
    [
        (["sh", "-c", 'exit "${TQDM_DISABLE-3}"'], 3, "no low-rank op"),  # the command line's own variable is not there
        (["true"], 2, "error: no low-rank op"),
        (["no-such-command", "-o", "x"], 2, "error: no-such-command cannot be started: No such file"),
    ],
)
def test_the_exit_code_is_the_commands(
    bench: Callable, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str], code: int, message: str
) -> None:
    monkeypatch.delenv("TQDM_DISABLE")
    outcome = bench("record", "-o", tmp_path / "w.json", *command)
    assert (outcome.code, outcome.out) == (code, "")
    assert message in outcome.err
    assert not list(tmp_path.iterdir())


def test_an_output_that_is_no_regular_file_is_refused_before_the_command_runs(bench: Callable, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for output in (tmp_path / "pipe", "/dev/null"):
        outcome = bench("record", "-o", output, "touch", tmp_path / "ran")
        assert (outcome.code, [path.name for path in tmp_path.iterdir()]) == (2, ["pipe"])
        assert "is not a file; give the name of a file" in outcome.err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "op"}, "kind 'op'; expected kind workload"),
        ({"schema_version": 2}, "schema_version 2 .* expected 1"),
        ({"calls": []}, "has no calls: no low-rank op"),
        ({"calls": [{"op": "lowrank_linear"}]}, r"calls\[0\] lacks the field 'captured'"),
        ({"op": "matmul"}, r"calls\[0\] has the unknown op 'matmul', known are lowrank_linear,"),
        ({"dtype": "int8"}, "unknown dtype 'int8'"),
        ({"count": 0}, "the count 0, both must be at least 1"),
        ({"shape": "24"}, "shape '24' is not KxNrR"),
        ({"shape": "24x16r4"}, "lowrank_linear_grouped does not take the shape 24x16r4"),
        ({"op": "singular_value_grad", "shape": "8x4r2", "form": "pivoted"}, "no pivoted and no quantised factors"),
        ({"form": "round"}, "form 'round' is not factored or pivoted"),
        ({"weights": "int3"}, "weights 'int3' are none of floating, int8, "),
    ],
)
def test_other_files_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    of_call = {**CALL.__dict__, **changes} if changes.keys() <= CALL.__dict__.keys() else CALL.__dict__
    path = written(tmp_path / "w.json", **{"calls": [of_call], **(changes if of_call is CALL.__dict__ else {})})
    with pytest.raises(ResultsError, match=f"w.json.*{message}"):
        read_recording(path)


def test_a_file_that_is_not_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "w.json").write_text("hello")
    with pytest.raises(ResultsError, match=r"is not JSON .* expected a workload that grasp bench record wrote"):
        read_recording(tmp_path / "w.json")
