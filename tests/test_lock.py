"""requirements.lock against pyproject.toml, and what make says of a lock file or a Python that it cannot use."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
from packaging.markers import Environment, default_environment
from packaging.requirements import Requirement

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
LOCK, PROJECT = ROOT / "requirements.lock", tomllib.loads((ROOT / "pyproject.toml").read_text())
PYTHONS = ("3.10.11", "3.11.0", "3.12.0", "3.13.0", "3.14.0")
GROUPS = ("data", "docs", "packaging")  # of make lock


def locked(text: str) -> dict[str, list[tuple[Requirement, list[str]]]]:
    """Name → its entries, each with its hashes. uv writes an entry as one logical line."""
    entries: dict[str, list[tuple[Requirement, list[str]]]] = {}
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            requirement, *hashes = line.split(" --hash=")
            entry = Requirement(requirement)
            entries.setdefault(entry.name, []).append((entry, [value.strip() for value in hashes]))
    return entries


def named() -> Iterator[Requirement]:
    """All that pyproject.toml asks for and `make lock` resolves, but grasp itself."""
    project = PROJECT["project"]
    groups = [PROJECT["dependency-groups"][name] for name in GROUPS]
    for names in (project["dependencies"], *project["optional-dependencies"].values(), *groups):
        yield from map(Requirement, names)


def environments() -> Iterator[Environment]:
    for version, machine in product(PYTHONS, ("x86_64", "aarch64")):
        environment = default_environment()
        environment |= {
            "python_full_version": version,
            "python_version": version.rpartition(".")[0],
            "platform_machine": machine,
            "platform_system": "Linux",
            "sys_platform": "linux",
        }
        yield environment


def test_each_python_and_processor_gets_one_release_of_all_that_pyproject_names() -> None:
    entries = locked(LOCK.read_text())
    for environment in environments():
        for wanted in named():
            if wanted.marker is not None and not wanted.marker.evaluate(environment):
                continue
            name = re.sub(r"[-_.]+", "-", wanted.name).lower()
            chosen = [entry for entry, _ in entries[name] if entry.marker is None or entry.marker.evaluate(environment)]
            assert len(chosen) == 1, f"{name} for {environment}: {chosen}; run make lock"
            (pin,) = chosen[0].specifier
            assert pin.operator == "==", f"{chosen[0]}; run make lock"
            assert wanted.specifier.contains(pin.version), f"{chosen[0]} is not {wanted}; run make lock"


def test_each_package_has_an_exact_version_and_hashes_of_its_files() -> None:
    entries = locked(LOCK.read_text())
    assert len(entries) > 150
    for entry, hashes in (pair for pairs in entries.values() for pair in pairs):
        assert [pin.operator for pin in entry.specifier] == ["=="], entry
        assert hashes, entry
        assert all(re.fullmatch("sha256:[0-9a-f]{64}", value) for value in hashes), entry


def made(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """`make` of the packages in a folder that has only the Makefile, pyproject.toml and requirements.lock."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(ROOT / name, folder)
    assignments = [f"{name}={value}" for name, value in variables.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", "packages", *assignments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


@needs_make
def test_make_refuses_a_python_that_the_lock_is_not_for(tmp_path: Path) -> None:
    shutil.copy(LOCK, tmp_path)
    python = tmp_path / "python3.9"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    run = made(tmp_path, PYTHON=str(python))
    assert run.returncode == 2
    assert f"{python} is not Python 3.10.11 to 3.14" in run.stderr
    assert "make PYTHON=" in run.stderr
    assert not (tmp_path / ".venv").exists()


def files(environment: Path) -> list[Path]:
    """All but the file by which uv keeps other uvs out."""
    return sorted(set(environment.rglob("*")) - {environment / ".lock"})


@pytest.fixture
def environment(tmp_path: Path) -> Path:
    """A virtual environment for make that has uv, and this one's uv at that."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / ".venv"], check=True)
    (tmp_path / ".venv/bin/uv").symlink_to(shutil.which("uv", path=str(Path(sys.executable).parent)) or "uv")
    (tmp_path / ".venv/.tools").touch()
    return tmp_path / ".venv"


@needs_make
@pytest.mark.parametrize(
    ("lock", "message"),
    [
        ("numpy==2.2.6\n", "numpy==2.2.6"),  # without a hash
        ("numpy>=2 --hash=sha256:00\n", "numpy"),
        ("<<<<<<< HEAD\n", "requirements.lock:1:1"),
    ],
)
def test_make_refuses_a_lock_that_was_edited_by_hand_and_changes_nothing(
    environment: Path, lock: str, message: str
) -> None:
    (environment.parent / "requirements.lock").write_text(lock)
    before = files(environment)
    run = made(environment.parent)
    assert run.returncode == 2
    assert message in run.stderr
    assert "was not installed" in run.stderr
    assert "git checkout requirements.lock, or make lock" in run.stderr
    assert files(environment) == before
