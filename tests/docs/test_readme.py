from __future__ import annotations

import re
from pathlib import Path

import pytest

from grasp_kernels.dispatch import BACKENDS
from tests.command_line import ROOT
from tests.documents import blocks, check_command, commands, run_python

README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = blocks(README, "python")
COMMANDS = commands(README)


@pytest.mark.slow
def test_every_python_block_runs_in_a_process_of_its_own_in_order(tmp_path: Path) -> None:
    assert len(PYTHON) == 3
    for code in PYTHON:
        assert run_python(code, tmp_path).strip()


def test_the_first_screen_has_both_commands() -> None:
    first_screen = "\n".join(README.splitlines()[:20])
    assert "make demo" in first_screen
    assert "make test" in first_screen


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_shown_exists(line: str) -> None:
    check_command(line)


def test_the_backends_shown_are_those_of_the_dispatch_table() -> None:
    section = README.split("## Backends")[1].split("\n## ")[0]
    assert tuple(re.findall(r"^\| `(\w+)`", section, re.MULTILINE)) == tuple(row.name for row in BACKENDS)
