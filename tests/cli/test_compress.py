from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest

from tests import command_line
from tests.command_line import TEXT, Outcome, RunMain, assert_refused, files, save_tiny_model


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compression-ratio", "1.5"], ["--compression-ratio must be in [0, 1), got 1.5"]),
        (["--retain-ratio", "0"], ["--retain-ratio must be in (0, 1], got 0"]),
        (
            ["--num-layers", "2", "--compression-ratio", "0.2"],
            ["--num-layers and --compression-ratio exclude each other"],
        ),
        (["--layers", "1-9"], ["decoder layers 0..2, got --layers [1, 2, 3"]),
        (["--num-layers", "4"], ["3 decoder layers, got --num-layers 4"]),
        (["--compression-ratio", "0.9"], ["the largest possible ratio is"]),
        (["--preset", "papre"], ["--preset must be one of best, paper, got 'papre'"]),
        (["--preset", "paper", "--metric", "size"], ["--metric must be one of taylor, gradient in paper, got 'size'"]),
        (["--metric", "gradient"], ["--metric is an option of --preset paper, got --preset best"]),
        (["--preset", "paper", "--refit"], ["--refit is an option of --preset best, got --preset paper"]),
        (["--costs", "H100"], ["--costs H100 needs --target-latency"]),
        (["--memory", "lots"], ["bytes must be a number such as 200MB", "got 'lots'"]),
        (["--memory", "0"], ["--memory must be a positive number of bytes, got 0"]),
        (["--memory", "1MB"], ["1.0 MB of memory above the loaded model are too little", "Give --memory"]),
        (["--memory", "1MB", "--dry-run"], ["1.0 MB of memory above the loaded model are too little", "--memory"]),
        (["--host-memory", "1GB"], ["the model is on the CPU; give memory"]),
        (["--host-memory", "1GB", "--dry-run"], ["the model is on the CPU; give memory"]),
        (["--dry-run", "--target-latency", "0.5", "--costs", "H9000"], ["'H9000'"]),
        (["--dry-run", "--target-latency", "0.001", "--costs", "H100"], ["--target-latency 0.001 cannot be reached"]),
        (["--num-samples", "1000"], ["the text has 1520 tokens; 1000 samples of 32 need 32000"]),
        (["--seq-len", "1"], ["--seq-len must be at least 2, got 1"]),
        (["--calibration", "no-such.txt"], ["no file no-such.txt; expected a text in UTF-8, or one of wikitext2"]),
        (["--calibration", "no-such.txt", "--dry-run"], ["no file no-such.txt; expected a text in UTF-8"]),
        (["--dtype", "int7"], ["--dtype must be one of auto, float32", "got 'int7'"]),
        (["--device", "toaster"], ["--device must be a name such as cpu, cuda", "got 'toaster'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    options: list[str], words: list[str], model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    before = files(tmp_path)
    common = ["--calibration", text, "--num-samples", 2, "--seq-len", 32]
    assert_refused(main("compress", model, "-o", tmp_path / "out" / "small", *common, *options), *words)
    assert files(tmp_path) == before


def test_an_output_folder_with_something_in_it_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, main: RunMain
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for options in ([], ["--dry-run"]):
        refused = main("compress", "no/such-model", "-o", tmp_path, *options)
        assert_refused(refused, "is not empty", "mine.txt", "give a new or an empty folder")
    assert files(tmp_path) == {"mine.txt"}


def test_a_full_disk_is_noticed_before_the_long_work(
    model: Path, text: Path, tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1, 1))
    refused = main(
        "compress", model, "-o", tmp_path / "out", "--calibration", text, "--num-samples", 2, "--seq-len", 32
    )
    assert_refused(refused, "GB are free")
    assert "block influence" not in refused.err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(text: Path, tmp_path: Path, main: RunMain) -> None:
    broken = save_tiny_model(tmp_path / "broken", nan=True)
    before = files(tmp_path)
    options = ["--calibration", text, "--num-samples", 2, "--seq-len", 32, "--num-layers", 1]
    assert_refused(main("compress", broken, "-o", tmp_path / "out", *options), "NaN or infinite")
    assert files(tmp_path) == before


def test_tables_show_what_was_done(model: Path, text: Path, tmp_path: Path, main: RunMain) -> None:
    out = tmp_path / "small"
    options = ["--calibration", text, "--num-samples", 2, "--seq-len", 32, "--layers", "0-1", "--retain-ratio", 0.4]
    shown = main("compress", model, "-o", out, *options, "--preset", "paper")
    assert shown.code == 0
    assert "14 replaced, 0 left" in shown.out
    assert "14 factored" in shown.out
    assert "40.0 % of the parameters of each matrix" in shown.out
    assert "layer 1 attention" in shown.err
    assert "perplexity" in main("evaluate", out, "--text", text, "--window", 64).out
    table = main("inspect", out).out
    assert "attention, low-rank" in table
    assert re.search(r"layer +q +k +v +o +gate +up +down +kept +BI", table)


def test_the_batch_size_can_be_found(main: RunMain, model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("compress", model, "-o", tmp_path / "out", "--layers", 2, "--num-samples", 4, "--seq-len", 32)
    outcome = main(*asked, "--calibration", text, "--batch-size", "auto", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["samples"]["batch_size"] == 4
    assert "batch size 4" in outcome.err


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_batch_size_that_is_none_is_refused(value: str, main: RunMain, model: Path, tmp_path: Path) -> None:
    outcome = main("compress", model, "-o", tmp_path / "out", "--batch-size", value)
    assert (outcome.code, outcome.err) == (2, f"error: batch size must be a positive number or auto; got {value!r}\n")


@pytest.mark.slow
def test_json_is_all_that_a_process_writes_to_stdout(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", text, "--num-samples", 6, "--seq-len", 32, "--num-layers", 1]
    run = command_line.grasp("compress", model, "-o", tmp_path / "out", *options, "--json", cwd=tmp_path, fresh=True)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["output"] == str(tmp_path / "out")
    steps = [line.split("  ")[0] for line in run.stderr.splitlines()]
    assert steps[0] == "loading tiny"
    assert steps[-1] == "saving"
    assert all(re.fullmatch(r".+ +\d+\.\d s", line) for line in run.stderr.splitlines())


@pytest.mark.slow
def test_a_process_with_bad_input_writes_one_line(model: Path, tmp_path: Path) -> None:
    run = command_line.grasp("compress", "no/such-model", "-o", tmp_path / "out", cwd=tmp_path)
    assert_refused(Outcome(run.returncode, run.stdout, run.stderr), "no/such-model")
    assert len(run.stderr.splitlines()) == 1
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_what_the_same_command_continues(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 100)
    options = ["-o", tmp_path / "new" / "out", "--calibration", text, "--num-samples", 500, "--seq-len", 32]
    process = subprocess.Popen(
        [sys.executable, "-m", "grasp", "compress", str(model), *map(str, options), "--num-layers", "3", "--json"],
        env=command_line.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in its background would have them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("prefix"):
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    kept = tmp_path / "new" / "out.partial"
    note, last = err.splitlines()[-2:]
    assert "again to resume" in note
    assert note.endswith(str(kept))
    assert last == "interrupted"
    assert "state.json" in files(kept)
    assert not (tmp_path / "new" / "out").exists()
