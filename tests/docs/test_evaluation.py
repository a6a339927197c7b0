"""The commands and the Python of docs/evaluation.md."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main

from grasp import cli
from grasp.evaluation.task_documents import ARROW_FOLDERS, PACKAGE_REQUIREMENT
from tests.command_line import ROOT, environment, grasp
from tests.task_documents import write_jsonl

PAGE = (ROOT / "docs/evaluation.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PYTHON = [code for language, code in FENCES if language == "python"]
COMMANDS = [line for language, code in FENCES if language == "sh" for line in code.splitlines()]


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("grasp ")])
def test_every_command_of_grasp_shown_exists(line: str) -> None:
    command = typer.main.get_command(cli.app)
    name, subcommand, rest = command.resolve_command(
        command.make_context("grasp", ["--help"], resilient_parsing=True), shlex.split(line)[1:]
    )
    subcommand.make_context(name, rest)  # raises at an option or a value that the command does not take


def test_what_is_said_of_the_package_is_so() -> None:
    assert PACKAGE_REQUIREMENT in PAGE
    assert all(f"`{task}`" in PAGE for task in ARROW_FOLDERS)


@pytest.mark.slow
def test_the_commands_for_the_card_and_the_python_run_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my-documents", "piqa")
    options = ["--num-layers", "1", "--num-samples", "2", "--seq-len", "64"]
    run = grasp("compress", "builtin", "-o", "small", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for line in COMMANDS:
        if line.endswith(("small/before.json", "small/results.json")) and "my-documents" in line:
            run = grasp(*shlex.split(line)[1:], cwd=tmp_path)
            assert run.returncode == 0, run.stderr
    card = (tmp_path / "small/README.md").read_text()
    assert "| before compression | `piqa`" in card
    assert "| this model | `piqa`" in card
    for code in PYTHON:
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{code}\n{done.stderr}"
        assert done.stdout.strip()
