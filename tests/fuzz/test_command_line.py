"""Random command lines, generated from the commands and options of the typer application itself."""

from __future__ import annotations

import os
import random
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from grasp import cli
from tests import command_line
from tests.command_line import Outcome, RunMain, save_tiny_model

HUGE = "9" * 400
NUMBERS = ["1", "2", "0", "-1", "0.5", "nan", "inf", "-inf", "1e400", "1_0", "١٢", " 3", "0x10", "2147483648", HUGE]
HOSTILE = [
    *("", " ", "-", "--", "[/b]", "[red]x", ":bomb:", "a\nerror: b", "a\x1b[31mb", "\x1b]0;t\x07", "\u202eabc"),
    *(
        "\udcff",
        "a ",
        "..",
        "/",
        "/dev/null",
        "/proc/self/mem",
        "~",
        "%s{0}",
        "x" * 240,
        "x" * 5000,
        "é" * 130,
        "a,b,,c",
    ),
    *("best", "paper", "builtin", "float32", "cpu", "cuda:99", "1-3,5", "3-1", "8x8r4", "200MB", "auto", "taylor"),
]
PATHS = ["MODEL", "TEXT", "loop", "file", "missing/x", "nested.json", "garbage.json", "new"]
# Every failure found so far, in the words that reproduced it.
CORPUS = [
    ["inspect", "[/b]"],
    ["inspect", "a\x1b[31mb"],
    ["compress", "MODEL", "-o", "new", "--target-bytes", HUGE],
    ["compress", "MODEL", "-o", "new", "--layers", "9" * 5000],
    ["compress", "MODEL", "-o", "new", "--seed", HUGE],
    ["compress", "MODEL", "-o", "loop"],
    ["compress", "MODEL", "-o", "x" * 240],
    ["demo", "-o", "loop/x"],
    ["bench", "ops", "--rows", HUGE],
    ["evaluate", "MODEL", "--text", ""],
    ["evaluate", "MODEL", "--text="],
    ["evaluate", ""],
    ["compress", "MODEL", "-o", ""],
    ["\x1b[0m"],
    ["env", "--\x1b]0;t\x07"],
]
# Functions that take long or ask the hub, by module; they are replaced by one that ends at once.
STUBBED = {
    "grasp.workflows.compress": "compress",
    "grasp.workflows.dry_run": "dry_run",
    "grasp.workflows.evaluate": "evaluate",
    "grasp.workflows.recover": "recover",
    "grasp.workflows.demo": "run_demo",
    "grasp.bench.ops": "run",
    "grasp.bench.model": "run",
    "grasp.bench.tuning": "tune",
    "grasp.loading": "load_quietly",
    "grasp.checkpoint.push": "push",
}


class Grammar:
    """Command lines of an application: real commands and options, real and hostile values."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._commands = list(_commands(typer.main.get_command(cli.app), []))

    def line(self) -> list[str]:
        """One command line: usually a command with its arguments and some options, sometimes with a mistake."""
        path, command = self._random.choice(self._commands)
        words: list[list[str]] = []
        for parameter in command.params:
            required = parameter.required and self._random.random() < 0.95
            if required or self._random.random() < 2 / len(command.params):
                for _ in range(self._random.choice([1, 1, 1, 1, 2])):
                    words.append(self._words(parameter))
        if self._random.random() < 0.2:
            self._random.shuffle(words)
        if self._random.random() < 0.05:
            words.insert(0, [self._random.choice(["--no-such", "-x", "--js", "--help", "--version", *HOSTILE])])
        return [*path, *(word for group in words for word in group)]

    def _words(self, parameter: Any) -> list[str]:
        if parameter.param_type_name == "argument":
            return [self._value(parameter)]
        name = self._random.choice([*parameter.opts, *parameter.secondary_opts])
        if parameter.is_flag:
            return [name]
        value = self._value(parameter)
        return [f"{name}={value}"] if name.startswith("--") and self._random.random() < 0.3 else [name, value]

    def _value(self, parameter: Any) -> str:
        kind = str(getattr(parameter, "type_descriptor", None) or parameter.type).lower()  # by version of typer
        numeric = any(word in kind for word in ("int", "float"))
        likely = NUMBERS if numeric else PATHS
        return self._random.choice(likely if self._random.random() < 0.7 else [*HOSTILE, *NUMBERS, *PATHS])


def _commands(command: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    """All commands that are not groups, with the words that call them; not `record`, which runs what it is given."""
    for name, inner in getattr(command, "commands", {}).items():
        yield from _commands(inner, [*path, name])
    if not hasattr(command, "commands") and path != ["bench", "record"]:
        yield path, command


class ReachedError(ValueError):
    """A command line was accepted, and the work would start."""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what ``PATHS`` names."""
    save_tiny_model(tmp_path / "MODEL")
    (tmp_path / "TEXT").write_text(command_line.TEXT)
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_bytes(b"\x00\xff")
    (tmp_path / "nested.json").write_text("[" * 100_000)
    (tmp_path / "garbage.json").write_text("{}<html>")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stubbed(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(*_: object, **__: object) -> None:
        raise ReachedError("the work would start")

    for module, name in STUBBED.items():
        loaded: ModuleType = __import__(module, fromlist=[name])
        assert hasattr(loaded, name)
        monkeypatch.setattr(loaded, name, reached)
    command = typer.main.get_command(cli.app)  # takes most of the time of a short command
    monkeypatch.setattr(typer.main, "get_command", lambda app: command)


def problem(outcome: Outcome, arguments: list[str]) -> str | None:
    """What is wrong with the way a command ended; ``None`` if nothing is."""
    errors = [line for line in outcome.err.splitlines() if line.startswith("error: ")]
    shown = (outcome.out + outcome.err).replace("\n", "")
    compares = arguments[:3] == ["bench", "gate", "compare"]
    if outcome.code not in (0, 2) and not (outcome.code == 1 and compares):
        return f"exit code {outcome.code}"
    if "Traceback" in outcome.err:
        return "traceback"
    if len(errors) > 1:
        return "several lines of error"
    if outcome.code == 2 and not outcome.err:
        return "no error is shown"
    if not shown.isprintable():
        return "control characters: " + repr(re.sub(r"[ -~]", "", shown))
    return None


def written(folder: Path, before: set[str], arguments: list[str]) -> set[str]:
    """Entries that a command made and that no argument names; all new ones are removed."""
    new = set(os.listdir(folder)) - before
    for name in new:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return {name for name in new if not any(name in argument for argument in arguments)} - {"demo", "report.html"}


def check(outcome: Outcome, arguments: list[str], place: Path, before: set[str]) -> None:
    reason = problem(outcome, arguments)
    others = written(place, before, arguments)
    assert reason is None, f"{reason}: grasp {arguments!r}\n{outcome.out[-500:]}\n{outcome.err[-1500:]}"
    assert not others, f"wrote {others}: grasp {arguments!r}"


@pytest.mark.parametrize("arguments", CORPUS, ids=lambda arguments: ascii(" ".join(arguments))[:60])
def test_command_lines_that_failed_once_end_with_one_line(
    arguments: list[str], place: Path, main: RunMain, stubbed: None
) -> None:
    outcome = main(*arguments)
    assert outcome.code == 2
    check(outcome, arguments, place, set(os.listdir(place)))


def test_random_command_lines_end_with_a_result_or_one_line(
    place: Path, main: RunMain, stubbed: None, fuzzing: bool, record_property: Any
) -> None:
    grammar, ends, before = Grammar(17), Counter[str](), set(os.listdir(place))
    for _ in range(10_000 if fuzzing else 500):
        arguments = grammar.line()
        outcome = main(*arguments)
        check(outcome, arguments, place, before)
        started = "the work would start" in outcome.err
        ends["accepted" if started or outcome.code == 0 else "refused"] += 1
    record_property("command lines", dict(ends))
    print(f"command lines: {dict(ends)}")
    assert min(ends["accepted"], ends["refused"]) > 0.05 * ends.total()


def test_random_command_lines_in_processes_of_their_own(place: Path, fuzzing: bool, record_property: Any) -> None:
    grammar, codes, before = Grammar(23), Counter[int](), set(os.listdir(place))
    cheap = ("inspect", "report", "evaluate", "recover")
    while codes.total() < (60 if fuzzing else 1):
        arguments = grammar.line()
        if arguments[0] not in cheap:
            continue
        run = subprocess.run(
            [sys.executable, "-m", "grasp", *arguments],
            cwd=place,
            env=command_line.environment(),
            capture_output=True,
            encoding="utf-8",
            errors="surrogateescape",
            timeout=300,
        )
        check(Outcome(run.returncode, run.stdout, run.stderr), arguments, place, before)
        codes[run.returncode] += 1
    record_property("processes", dict(codes))
    print(f"processes: {dict(codes)}")
