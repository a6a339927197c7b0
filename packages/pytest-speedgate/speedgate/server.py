"""The process of another version: runs the tests that it is asked for, and lends their candidates turn by turn."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest

from speedgate.timing import Batch


class Server:
    """A pytest plugin that replaces the run of all tests; it answers ``speedgate.other_version.OtherVersion``."""

    def __init__(self, descriptor: int, root: Path) -> None:
        self._connection, self._root = Connection(descriptor), root
        self._modules: Sequence[str] = ()  # names of the project's modules in the asking process
        self._answered = False  # whether the asking process expects nothing more of the running test
        self._failure = ""

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtestloop(self, session: pytest.Session) -> bool | None:
        """Run tests by name until the other process ends."""
        if session.testsfailed:  # a file cannot be imported: pytest itself says so, and ends
            return None
        items = {item.nodeid: item for item in session.items}
        try:
            self._send("tests", list(items))
            while True:
                kind, *content = self._receive()
                if kind == "run":
                    name, self._modules = content
                    self._run(items[name])
        except (EOFError, ConnectionError):
            return True

    def _send(self, *message: Any) -> None:
        self._connection.send_bytes(json.dumps(message).encode())

    def _receive(self) -> list[Any]:
        message: list[Any] = json.loads(self._connection.recv_bytes())
        return message

    def _run(self, item: pytest.Item) -> None:
        self._answered, self._failure = False, "it was skipped, or does not call gate"
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=None)
        if not self._answered:
            self._send("error", f"{item.nodeid} was not timed: {self._failure}")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the reason of a failure."""
        if report.failed:
            self._failure = report.longreprtext

    def lend(self, batch: Batch, measures: Mapping[str, Sequence[float]]) -> None:
        """Make the calls of a test's candidate whenever the other process asks for a turn."""
        if self._answered:  # pytest-benchmark makes the call once more, to profile it
            return
        if complaint := self._complaint():
            self._send("error", complaint)
        else:
            self._send("ready", batch.calls, measures)
            while self._receive() == ["turn"]:
                self._send("seconds", batch.seconds())
        self._answered = True

    def _complaint(self) -> str | None:
        """Which module of the project is not this version's."""
        for name in self._modules:
            file = getattr(sys.modules.get(name), "__file__", None)
            if file and not Path(file).resolve().is_relative_to(self._root):
                return (
                    f"the module {name} comes from {file}, expected from {self._root}; the project must be importable "
                    "from its folder, from src, or by pytest's option pythonpath"
                )
        return None
