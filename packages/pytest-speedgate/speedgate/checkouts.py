"""The checkout of another version: a folder, or a git revision in a temporary worktree."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class OtherVersionError(Exception):
    """The other version cannot be checked out, imported or timed."""


@contextmanager
def checkout(version: str, root: Path) -> Iterator[Path]:
    """The folder in another version that corresponds to ``root``.

    Args:
        version: such a folder itself, or a git revision, see ``worktree``.
        root: the project's folder in this version.

    Raises:
        OtherVersionError: if there is neither.
    """
    if Path(version).is_dir():
        yield Path(version).resolve()
    else:
        with worktree(version, root) as folder:
            yield folder


@contextmanager
def worktree(version: str, root: Path) -> Iterator[Path]:
    """The folder in a git revision that corresponds to ``root``: checked out for the block into a temporary folder.

    Raises:
        OtherVersionError: if there is no such revision.
    """
    top = Path(git(f"{version} is no folder, and no git revision", root, "rev-parse", "--show-toplevel"))
    unknown = f"there is no folder and no git revision {version}"
    commit = git(unknown, root, "rev-parse", "--verify", "--quiet", f"{version}^{{commit}}")
    folder = Path(tempfile.mkdtemp(prefix="speedgate-")).resolve()
    try:
        copy = folder / top.name
        git(f"{version} was not checked out", root, "worktree", "add", "--detach", "--quiet", str(copy), commit)
        yield copy / root.resolve().relative_to(top)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        git("the worktree was not removed", root, "worktree", "prune")


def git(problem: str, root: Path, *arguments: str) -> str:
    """Output of git in a folder; a failure is an error that begins with ``problem``."""
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise OtherVersionError(f"{problem}: git is missing ({error.strerror}); give a folder instead") from error
    if done.returncode:
        raise OtherVersionError(f"{problem}: git {arguments[0]} failed in {root}. {done.stderr.strip()}".rstrip())
    return done.stdout.strip()
