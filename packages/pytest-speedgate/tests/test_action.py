"""The steps of action.yml, run as they stand: by bash, in a project that the test writes, without a network."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PACKAGE = Path(__file__).parents[1]
ACTION = yaml.safe_load((PACKAGE / "action.yml").read_text(encoding="utf-8"))
PULL_REQUEST = "https://github.com/owner/project/pull/7"

pytestmark = pytest.mark.slow


class Runner:
    """A runner of GitHub, as far as the action's steps see one."""

    def __init__(self, project: Path, folder: Path, environment: dict[str, str]) -> None:
        self.project, self.temporary, self.programs = project, folder / "runner", folder / "programs"
        self.temporary.mkdir()
        self.programs.mkdir()
        (self.programs / "gh").write_text(f'#!/bin/sh\necho "$GH_TOKEN $*" >> {folder}/comments\n')
        (self.programs / "gh").chmod(0o755)
        shutil.copytree(PACKAGE, folder / "action", ignore=shutil.ignore_patterns("tests", "__pycache__"))
        inputs = {name: field.get("default", "") for name, field in ACTION["inputs"].items()}
        self.values = {
            **{f"inputs.{name}": value for name, value in inputs.items()},
            "inputs.tests": "test_speed.py",
            "inputs.token": "secret",
            "github.action_path": str(folder / "action"),
            "github.event.pull_request.html_url": PULL_REQUEST,
        }
        self.environment = {
            **environment,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), str(self.programs), os.environ["PATH"]]),
            "RUNNER_TEMP": str(self.temporary),
            "GITHUB_STEP_SUMMARY": str(folder / "summary.md"),
            # pip installs into a folder of the test, from what is here.
            "PIP_TARGET": str(folder / "installed"),
            "PIP_NO_DEPS": "1",
            "PIP_NO_INDEX": "1",
            "PIP_NO_BUILD_ISOLATION": "0",
            "PYTHONPATH": str(folder / "installed"),
        }

    def run(self, step: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        """Run a step as GitHub does."""
        assert step["shell"] == "bash"
        expression = re.compile(r"\$\{\{ (.+?) \}\}")
        variables = {
            name: expression.sub(lambda match: self.values[match[1]], text) for name, text in step["env"].items()
        }
        assert "${{" not in step["run"]  # a title of a pull request must not become code
        command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]]
        environment = {**self.environment, **variables}
        return subprocess.run(command, cwd=self.project, env=environment, capture_output=True, text=True)


def test_the_steps_install_compare_and_comment(project: Path, tmp_path: Path, environment: dict[str, str]) -> None:
    runner = Runner(project, tmp_path, environment)
    install, compare, comment = ACTION["runs"]["steps"]
    installed = runner.run(install)
    assert installed.returncode == 0, installed.stderr
    assert runner.run(comment).returncode == 0  # there is nothing to say yet
    assert not (tmp_path / "comments").exists()

    compared = runner.run(compare)
    assert compared.returncode == 1, compared.stdout + compared.stderr
    assert "2 regression" in compared.stdout
    table = (runner.temporary / "speedgate.md").read_text()
    assert "| ❌ regression | kernel of size 1 | time over HEAD^1 | 1.000 | 1.300 " in table
    assert (tmp_path / "summary.md").read_text() == table

    assert runner.run(comment).returncode == 0
    arguments = f"--edit-last --create-if-none --body-file {runner.temporary}/speedgate.md"
    assert (tmp_path / "comments").read_text() == f"secret pr comment {PULL_REQUEST} {arguments}\n"


def test_a_comment_is_written_even_after_a_failure_but_only_on_request() -> None:
    condition = ACTION["runs"]["steps"][-1]["if"]
    assert condition == "always() && inputs.comment == 'true' && github.event_name == 'pull_request'"
    assert ACTION["inputs"]["comment"]["default"] == "false"
