"""Finds the commit that made a benchmark slower: a binary search in which each version takes turns with the first."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from speedgate import baselines
from speedgate.checkouts import OtherVersionError, git, worktree
from speedgate.other_version import environment, pytest_command, tail
from speedgate.verdicts import BaselineError, Change, compare_entries


@dataclass(frozen=True)
class Culprit:
    """The first commit that is slower."""

    commit: str  # abbreviated, and its subject
    before: Change  # of the same call, at the commit before
    now: Change

    def __str__(self) -> str:
        """One line to print."""
        return (
            f"{self.commit}: {self.now.label}: {self.now.what} is {self.now.now:.3f} ({self.now.range}), "
            f"one commit before {self.before.now:.3f} ({self.before.range})"
        )


@dataclass(frozen=True)
class Search:
    """What is tried at each commit."""

    root: Path  # the project's folder
    tests: Sequence[str]  # files or node ids
    build: str  # shell command that builds a checkout, run in its folder; ``""`` for none
    threshold: float  # slower by more than this fraction is a regression

    def culprit(self, good: str, bad: str) -> Culprit:
        """The first commit after ``good``, along the first parents of ``bad``, that is slower than ``good``.

        Raises:
            OtherVersionError: if ``bad`` is not slower, or a commit cannot be built or timed.
        """
        between = f"{good}..{bad}"
        listed = git(f"{between} are no commits", self.root, "rev-list", "--reverse", "--first-parent", between)
        commits = [good, *listed.split()]
        with worktree(good, self.root) as first:
            self._build(good, first)
            fast, slow = 0, len(commits) - 1
            changes = {slow: self._changes(commits[slow], first, good)}
            if not _any_slower(changes[slow]):
                raise OtherVersionError(f"{bad} is not slower than {good}: {next(iter(changes[slow].values())).line()}")
            while slow - fast > 1:
                middle = (fast + slow) // 2
                changes[middle] = self._changes(commits[middle], first, good)
                fast, slow = (fast, middle) if _any_slower(changes[middle]) else (middle, slow)
            before = changes.get(fast) or self._changes(commits[fast], first, good)
        if not (shared := [name for name in changes[slow] if name in before]):
            raise OtherVersionError(f"{commits[slow]} and {commits[fast]} have no test in common")
        name = max(shared, key=lambda name: changes[slow][name].change)
        commit = git("the commit has no name", self.root, "log", "-1", "--format=%h %s", commits[slow])
        return Culprit(commit, before[name], changes[slow][name])

    def _build(self, commit: str, folder: Path) -> None:
        if not self.build:
            return
        done = subprocess.run(self.build, shell=True, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise OtherVersionError(f"{commit} was not built: {self.build}{tail(done.stdout + done.stderr)}")

    def _changes(self, commit: str, first: Path, good: str) -> dict[str, Change]:
        """Changes of the ratio from the first version to a commit, by test."""
        with worktree(commit, self.root) as folder, tempfile.TemporaryDirectory() as temporary:
            self._build(commit, folder)
            recorded = Path(temporary) / "recorded.json"
            options = [f"--rootdir={folder}", "-p", "no:cacheprovider", f"--benchmark-json={recorded}"]
            done = subprocess.run(
                pytest_command(*options, f"--gate-against={first}", f"--gate-threshold={self.threshold}", *self.tests),
                cwd=folder,
                env=environment(self.root, folder),
                capture_output=True,
                text=True,
            )
            try:
                document = baselines.read(recorded)
            except BaselineError as error:
                raise OtherVersionError(f"{commit} was not timed{tail(done.stdout + done.stderr)}") from error
        changes = {}
        for name, entry in document.entries.items():
            now = replace(entry, against=good)
            unchanged = replace(now, seconds=now.yardstick_seconds)
            changes[name] = next(compare_entries(unchanged, now, document.where.kind, self.threshold))
        # A measure that grew ends the run with 1 too. Only the time is searched for.
        if not changes or done.returncode not in (0, 1) or re.search(r"^(FAILED|ERROR) ", done.stdout, re.MULTILINE):
            raise OtherVersionError(f"{commit} was not timed (exit code {done.returncode}){tail(done.stdout)}")
        return changes


def _any_slower(changes: Mapping[str, Change]) -> bool:
    return any(change.verdict == "regression" for change in changes.values())
