"""Reads the files of users and checkpoints: regular files of a limited size, and JSON of a limited depth."""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from grasp.errors import GraspError
from grasp.formatting import one_line, size

LIMIT = 64_000_000  # bytes of a file that is read whole, and of a line
_DEPTH = 100  # levels of nested JSON
_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_MARK = "\ufeff"  # with which some editors begin a file in UTF-8
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def open_regular(path: str | Path, expected: str, error: type[Exception] = GraspError) -> BinaryIO:
    """Open a regular file, or a link to one, for reading bytes. A named pipe is refused without waiting for a writer.

    Args:
        path: the file.
        expected: the file that the user should give; each message ends with it.
        error: class of the exceptions, whose messages have one line.

    Raises:
        GraspError: of the class ``error``; the file is missing, unreadable or not regular.

    Example:
        >>> open_regular("/dev/zero", "a text file")
        Traceback (most recent call last):
        grasp.errors.GraspError: /dev/zero is a device; expected a text file
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY)
    except FileNotFoundError as reason:
        raise error(f"there is no file {path}; expected {expected}") from reason
    except (OSError, ValueError) as reason:  # ValueError: the path has a NUL character
        raise error(f"{path} cannot be read ({_reason(reason)}); expected {expected}") from reason
    kind = stat.S_IFMT(os.fstat(descriptor).st_mode)
    if kind != stat.S_IFREG:
        os.close(descriptor)
        raise error(f"{path} is {_KINDS.get(kind, 'no regular file')}; expected {expected}")
    return os.fdopen(descriptor, "rb")


def read_text_file(path: str | Path, expected: str, error: type[Exception] = GraspError) -> str:
    """Read a whole UTF-8 file; line ends become ``"\\n"``.

    Arguments: see ``open_regular``.

    Raises:
        GraspError: of the class ``error``; as ``open_regular``, or the file is larger than ``LIMIT`` or not UTF-8.

    Example:
        >>> read_text_file("/etc", "a model card")
        Traceback (most recent call last):
        grasp.errors.GraspError: /etc is a folder; expected a model card
    """
    with open_regular(path, expected, error) as file:
        try:
            content = b"" if (length := os.fstat(file.fileno()).st_size) > LIMIT else file.read(LIMIT + 1)
        except OSError as reason:
            raise error(f"{path} cannot be read ({_reason(reason)}); expected {expected}") from reason
    if max(length, len(content)) > LIMIT:
        raise error(f"{path} has more than {size(LIMIT)}; expected {expected}")
    text = _decoded(content, str(path), expected, error).removeprefix(_MARK)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_lines(path: str | Path, expected: str, error: type[Exception] = GraspError) -> Iterator[tuple[int, str]]:
    """Read a UTF-8 file line by line, without blank lines: the number of each line, from 1, and its text.

    Arguments: see ``open_regular``.

    Raises:
        GraspError: of the class ``error``; as ``open_regular``, or a line is longer than ``LIMIT`` or not UTF-8.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     print("first\\n\\nthird", file=file, flush=True)
        ...     list(read_lines(file.name, "a text file"))
        [(1, 'first'), (3, 'third')]
    """
    with open_regular(path, expected, error) as file:
        number = 0
        try:
            while line := file.readline(LIMIT + 1):
                number += 1
                place = f"line {number} of {path}"
                if len(line) > LIMIT:
                    raise error(f"{place} has more than {size(LIMIT)}; expected {expected}")
                if line.strip():
                    text = _decoded(line, place, expected, error).rstrip("\r\n")
                    yield number, text.removeprefix(_MARK) if number == 1 else text
        except OSError as reason:
            raise error(f"{path} cannot be read ({_reason(reason)}); expected {expected}") from reason


def read_json(
    path: str | Path, expected: str, error: type[Exception] = GraspError, *, finite: bool = True
) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Arguments: see ``open_regular`` and ``parse_json``.

    Raises:
        GraspError: of the class ``error``; as ``read_text_file`` or ``parse_json``.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w") as file:
        ...     print('{"ranks": {}}', file=file, flush=True)
        ...     read_json(file.name, "a configuration")
        {'ranks': {}}
    """
    return parse_json(read_text_file(path, expected, error), str(path), expected, error, finite=finite)


def parse_json(
    text: str, place: str, expected: str, error: type[Exception] = GraspError, *, finite: bool = True
) -> dict[str, Any]:
    """Parse a JSON object whose numbers are finite floats or integers that a float can hold.

    Args:
        text: the JSON text.
        place: the name of the text in messages, such as its path.
        expected: as for ``open_regular``; ``error`` too.
        finite: refuse ``NaN`` and ``Infinity``, which JSON does not have and transformers writes into some files.

    Raises:
        GraspError: of the class ``error``; the text is no such object, or has more than 100 levels.

    Example:
        >>> parse_json('{"rank": 8}', "the report", "a report.json")
        {'rank': 8}
        >>> parse_json("[8]", "the report", "a report.json")
        Traceback (most recent call last):
        grasp.errors.GraspError: the report is a JSON list, not an object; expected a report.json
    """
    try:
        constant = _refuse if finite else float
        value = json.loads(text, parse_int=_integer, parse_float=_real, parse_constant=constant)
        _require_shallow(value)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()  # raises if a surrogate has no partner
    except (ValueError, RecursionError) as reason:
        got = (
            f"has more than {_DEPTH} levels"
            if isinstance(reason, RecursionError)
            else f"is not JSON ({one_line(reason)})"
        )
        raise error(f"{place} {got}; expected {expected}") from reason
    if not isinstance(value, dict):
        raise error(f"{place} is a JSON {type(value).__name__}, not an object; expected {expected}")
    return value


def _decoded(content: bytes, place: str, expected: str, error: type[Exception]) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as reason:
        byte = f"byte {reason.start} is {content[reason.start]:#04x}"
        raise error(f"{place} is not UTF-8 ({byte}); expected {expected}") from reason


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or one_line(error)


def _integer(text: str) -> int:
    _real(text)
    return int(text)


def _real(text: str) -> float:
    if math.isinf(value := float(text)):
        _refuse(text)
    return value


def _refuse(number: str) -> NoReturn:
    raise ValueError(f"a number is {one_line(number, 24)}")


def _require_shallow(value: Any) -> None:
    level = [value]
    for _ in range(_DEPTH + 1):
        children = [
            item.values() if isinstance(item, dict) else item for item in level if isinstance(item, (dict, list))
        ]
        level = [item for group in children for item in group]
        if not level:
            return
    raise RecursionError
