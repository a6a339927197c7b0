"""What the tests of documents share: the code blocks of a markdown text, and ways to run or check them."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import typer.main

from grasp import builtin, calibration, cli
from tests.command_line import ROOT, environment


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for found, code in fences if found == language]


def commands(text: str) -> list[str]:
    """The commands of all ``sh`` blocks, without comments; a backslash continues a line."""
    code = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    return [line for line in (line.split("#")[0].strip() for line in code.splitlines()) if line]


def run_python(code: str, folder: Path) -> str:
    """Run code in a process of its own; its stdout."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment(), capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, f"{code}\n{run.stderr}"
    return run.stdout


def check_packages(requirements: list[str]) -> None:
    """Check that what pip is told to install is this project with extras that it has, or what loading asks for."""
    for requirement in requirements:
        if extras := re.fullmatch(r"\.\[([a-z,-]+)\]", requirement):
            project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
            assert all(re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in extras[1].split(","))
        else:
            assert requirement in (builtin.BUILTIN_REQUIREMENT, calibration.BUILTIN_REQUIREMENT)


def check_command(line: str) -> None:
    """Check that a ``make``, ``pip install`` or ``grasp`` command exists and takes what it is given."""
    program, *arguments = shlex.split(line)
    if program == "torchrun":
        program, *arguments = arguments[arguments.index("-m") + 1 :]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert arguments
        assert set(arguments) <= set(targets)
    elif program == "pip":
        check_packages([argument for argument in arguments[1:] if not argument.startswith("-")])
    else:
        assert program == "grasp"
        command = typer.main.get_command(cli.app)
        name, subcommand, rest = command.resolve_command(
            command.make_context("grasp", ["--help"], resilient_parsing=True), arguments
        )
        subcommand.make_context(name, rest)  # raises at an option or a value that the command does not take
