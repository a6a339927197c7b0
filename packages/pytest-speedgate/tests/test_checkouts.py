from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from speedgate.checkouts import OtherVersionError, checkout


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository whose project lies in a folder of it, and has changed since the commit."""
    project = tmp_path / "top" / "project"
    project.mkdir(parents=True)
    (project / "file").write_text("committed")
    author = ("-c", "user.name=a", "-c", "user.email=a@b")
    for arguments in (("init", "--quiet"), ("add", "."), (*author, "commit", "--quiet", "-m", "a version")):
        subprocess.run(["git", *arguments], cwd=tmp_path / "top", check=True)
    (project / "file").write_text("changed")
    return project


def test_a_revision_is_checked_out_and_removed(repository: Path) -> None:
    with checkout("HEAD", repository) as folder:
        assert (folder.name, (folder / "file").read_text()) == ("project", "committed")
    assert not folder.parents[1].exists()
    worktrees = subprocess.run(["git", "worktree", "list"], cwd=repository, capture_output=True, text=True).stdout
    assert len(worktrees.splitlines()) == 1


def test_a_project_behind_a_link_is_found_in_its_revision(repository: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(repository)
    with checkout("HEAD", tmp_path / "link") as folder:
        assert (folder.name, (folder / "file").read_text()) == ("project", "committed")


def test_a_folder_is_taken_as_it_is(tmp_path: Path) -> None:
    with checkout(str(tmp_path), tmp_path) as folder:
        assert folder == tmp_path.resolve()
    assert tmp_path.exists()


@pytest.mark.parametrize("inside", [True, False])
def test_what_is_neither_is_an_error(inside: bool, repository: Path, tmp_path: Path) -> None:
    complaint = "there is no folder and no git revision no" if inside else "no is no folder, and no git revision"
    with pytest.raises(OtherVersionError, match=complaint), checkout("no", repository if inside else tmp_path):
        pass
