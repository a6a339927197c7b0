"""The workflows of GitHub run the commands of the Makefile, and a release tests every wheel that it builds."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from grasp.version import __version__
from tests.command_line import ROOT
from tests.documents import check_command, read

FOLDER = ROOT / ".github" / "workflows"
WORKFLOWS = {path.stem: yaml.safe_load(path.read_text()) for path in FOLDER.glob("*.yml")}


def jobs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Each job of each workflow."""
    for workflow, content in WORKFLOWS.items():
        yield from ((f"{workflow}/{name}", job) for name, job in content["jobs"].items())


@pytest.mark.parametrize(("name", "job"), list(jobs()), ids=[name for name, _ in jobs()])
def test_every_command_of_ours_exists(name: str, job: dict[str, Any]) -> None:
    assert job["runs-on"]
    for run in [step["run"] for step in job["steps"] if "run" in step]:
        if run.startswith("make "):
            check_command(run)
        for script in re.findall(r"^[\w/]+\.sh", run):
            assert (ROOT / script).stat().st_mode & 0o100, f"{name}: {script} cannot be executed"


def test_the_checks_are_those_of_make_check_on_all_python_versions() -> None:
    commands = {step.get("run") for _, job in jobs() for step in job["steps"]}
    assert {f"make {target}" for target in ("lint", "docs", "test")} <= commands
    oldest = re.search(r'requires-python = ">=([\d.]+)"', read("pyproject.toml"))
    assert oldest is not None
    assert WORKFLOWS["checks"]["jobs"]["tests"]["strategy"]["matrix"]["python"][0] == oldest[1]


def test_a_release_tests_a_wheel_of_each_python_before_it_publishes_without_a_token() -> None:
    release = WORKFLOWS["release"]["jobs"]
    built = re.findall(r"cp3(\d+)/bin", release["build"]["env"]["WHEEL_PYTHONS"])
    assert [f"3.{minor}" for minor in built] == release["test"]["strategy"]["matrix"]["python"]
    assert (release["test"]["needs"], release["publish"]["needs"]) == ("build", "test")
    assert release["publish"]["permissions"] == {"id-token": "write"}
    assert "secrets." not in (FOLDER / "release.yml").read_text()


def test_a_release_reads_the_version_where_the_package_has_it() -> None:
    pattern = re.search(r"s/(\^__version__.*)\$/", (FOLDER / "release.yml").read_text())
    assert pattern is not None
    found = re.search(pattern[1].replace(r"\(", "(").replace(r"\)", ")"), read("grasp/version.py"), re.MULTILINE)
    assert found is not None
    assert found[1] == __version__
