from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from grasp import cli
from grasp_kernels.dispatch import BACKENDS
from tests.command_line import ROOT, environment

README = (ROOT / "README.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCES if language == "python"]
COMMANDS = [line.split("#")[0].strip() for language, code in FENCES if language == "sh" for line in code.splitlines()]


@pytest.mark.slow
def test_every_python_block_runs_in_a_process_of_its_own_in_order(tmp_path: Path) -> None:
    assert len(PYTHON) == 3
    for code in PYTHON:
        run = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600
        )
        assert run.returncode == 0, f"{code}\n{run.stderr}"
        assert run.stdout.strip()


def test_the_first_screen_has_both_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_exists(line: str) -> None:
    program, *arguments = shlex.split(line)
    if program == "torchrun":
        program, *arguments = arguments[arguments.index("-m") + 1 :]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments
        assert set(arguments) <= set(targets)
    else:
        assert program == "grasp"
        command = typer.main.get_command(cli.app)
        name, subcommand, rest = command.resolve_command(
            command.make_context("grasp", ["--help"], resilient_parsing=True), arguments
        )
        subcommand.make_context(name, rest)  # raises at an option or a value that the command does not take


def test_the_backends_shown_are_those_of_the_dispatch_table() -> None:
    section = README.split("## Backends")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == tuple(row.name for row in BACKENDS)
