"""Another version of the project in a process of its own, whose candidates take turns with those of this version."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

from speedgate.checkouts import OtherVersionError
from speedgate.verdicts import Entry

PACKAGE = Path(__file__).resolve().parent
TAIL = 15  # lines of the process's output in a message
# speedgate must be this one, whatever the other version has: it is imported first, from its own place.
START = """
import sys
sys.path.insert(0, sys.argv[1])
import pytest, speedgate.plugin
sys.path.remove(sys.argv[1])
sys.exit(pytest.main(sys.argv[2:], plugins=[speedgate.plugin]))
"""


@dataclass
class RemoteBatch:
    """The calls of the other version's candidate, made there."""

    seconds: Callable[[], float]  # makes the calls there; the seconds of one call
    calls: int
    measures: Mapping[str, tuple[float, ...]]


class OtherVersion:
    """A pytest in another checkout.

    Args:
        name: name in reports.
        root: the project's folder in the other version.
        own_root: the project's folder in this version.
        files: files of tests, relative to both.
        options: pytest's options.
    """

    def __init__(self, name: str, root: Path, own_root: Path, files: Sequence[Path], options: Sequence[str]) -> None:
        self.name, self.entries = name, dict[str, Entry]()  # measured there, by test
        self._own_root = own_root
        self._output = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the process
        self._connection, theirs = Pipe()
        serve = ("-p", "no:cacheprovider", f"--rootdir={root}", f"--gate-serve={theirs.fileno()}")
        with theirs:
            self._process = subprocess.Popen(
                pytest_command(*serve, *options, *map(str, files)),
                cwd=root,
                env=environment(own_root, root),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
            )

    def require(self, tests: Sequence[str]) -> None:
        """Check that the other version has these tests.

        Raises:
            OtherVersionError: if it lacks one, or its files cannot be imported.
        """
        existing = set(self._receive("tests")[0])
        if missing := [name for name in tests if name not in existing]:
            more = f" and {len(missing) - 1} more" if missing[1:] else ""
            raise OtherVersionError(
                f"{self.name} does not have the test {missing[0]}{more}; deselect what is new with -k or --deselect"
            )

    @contextmanager
    def test(self, name: str) -> Iterator[RemoteBatch]:
        """Run a test there up to its call of ``gate``, and let it end after the block.

        Raises:
            OtherVersionError: if it does not get there, or its process ends.
        """
        self._send("run", name, _modules_below(self._own_root))
        calls, measures = self._receive("ready")
        try:
            yield RemoteBatch(self._seconds, calls, {key: tuple(values) for key, values in measures.items()})
        finally:
            self._send("end")

    def close(self) -> None:
        """End the process."""
        self._connection.close()
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.close()

    def _seconds(self) -> float:
        self._send("turn")
        return float(self._receive("seconds")[0])

    def _send(self, *message: Any) -> None:
        try:
            self._connection.send_bytes(json.dumps(message).encode())
        except OSError as error:
            raise self._ended() from error

    def _receive(self, expected: str) -> list[Any]:
        """The content of a message of one kind."""
        try:
            kind, *content = json.loads(self._connection.recv_bytes())
        except (EOFError, OSError) as error:
            raise self._ended() from error
        if kind != expected:
            raise OtherVersionError(f"{self.name}: {content[0]}")
        return content

    def _ended(self) -> OtherVersionError:
        code = self._process.wait()
        self._output.seek(0)
        return OtherVersionError(
            f"{self.name}: its tests cannot be imported, or its process died (exit code {code}). A version that must "
            f"be built needs a built checkout: --gate-against=FOLDER. Its last lines:{tail(self._output.read())}"
        )


def tail(output: str) -> str:
    """The last lines of a program's output, to end a message with."""
    return "".join(f"\n  {line}" for line in output.splitlines()[-TAIL:])


def pytest_command(*arguments: str) -> list[str]:
    """Command that starts a pytest with this speedgate."""
    return [sys.executable, "-c", START, str(PACKAGE.parent), *arguments]


def environment(own_root: Path, root: Path) -> dict[str, str]:
    """The environment, with the import path of this process moved from this version to the other."""
    paths = [
        root / path.relative_to(own_root)
        for path in (Path(p).resolve() for p in sys.path)
        if _is_of_project(path, own_root)
    ]
    others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = [path for path in others if not _is_of_project(Path(path).absolute(), own_root)]
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_ADDOPTS")}
    return {**variables, "PYTHONPATH": os.pathsep.join(map(str, [*paths, root, root / "src", *kept]))}


def _modules_below(root: Path) -> list[str]:
    """Names of the loaded modules of the project."""
    files = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items())}
    return [name for name, file in files.items() if file and _is_of_project(Path(file).resolve(), root)]


def _is_of_project(path: Path, root: Path) -> bool:
    """Whether a path belongs to the project, not to an environment inside its folder, and not to speedgate."""
    foreign = (Path(sys.prefix), Path(sys.prefix).resolve(), PACKAGE)
    return path.is_relative_to(root) and not any(path.is_relative_to(folder) for folder in foreign)
