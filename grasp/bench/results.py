"""Files of benchmark results: one JSON object a line, or tables."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path

from grasp.bench.records import RECORDS
from grasp.bench.schema import LineError, Record, from_dict
from grasp.bench.tables import FORMATS
from grasp.errors import ResultsError
from grasp.files import require_writable, write_whole
from grasp.reading import parse_json, read_lines


def append_results(path: Path, records: Sequence[Record]) -> None:
    """Append records to a file as JSON lines, in one write.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
        ResultsError: if the file cannot be written. It then stays as it was.

    Example:
        >>> import tempfile
        >>> from grasp.bench.records import NotMeasured
        >>> left_out = NotMeasured("ops", "cuda", "no CUDA device")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_results(Path(folder, "ops.jsonl"), [left_out])
        ...     read_results(Path(folder, "ops.jsonl")) == [left_out]
        True
    """
    text = "".join(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)
    _append(path, text.encode())


def check_output(path: Path, further: Sequence[type[Record]] = ()) -> None:
    """Check that results can be appended to a file, before hours are spent. The file is not changed.

    Args:
        path: the file.
        further: record classes that the file may have, besides ``RECORDS``.

    Raises:
        GraspError: if it cannot be written.
        ResultsError: if it holds anything but results.
    """
    require_writable(path)
    if path.exists():
        read_results(path, further)
        _append(path, b"")


def check_outputs(paths: Sequence[Path]) -> None:
    """Check that ``save_results`` can write all files, before hours are spent. None is changed.

    Raises:
        GraspError, ResultsError: as ``check_output``, also if a file for tables exists, or one is given twice.
    """
    for index, path in enumerate(paths):
        if os.path.realpath(path) in map(os.path.realpath, paths[:index]):
            raise ResultsError(f"{path} is given twice; expected different files")
        if path.suffix not in FORMATS:
            check_output(path)
        elif path.exists():
            raise ResultsError(f"{path} exists, and tables are not appended; expected the name of a new file")
        else:
            require_writable(path)


def save_results(paths: Sequence[Path], records: Sequence[Record], earlier: Sequence[Record] = ()) -> None:
    """Write records to every file: ``.md`` and ``.csv`` get tables, others have JSON lines appended.

    Args:
        paths: the files.
        records: the new records.
        earlier: records of this run that are in the files; tables are written again with them.

    Raises:
        ValueError, GraspError, ResultsError: as ``append_results`` and ``write_whole``.

    Example:
        >>> import tempfile
        >>> from grasp.bench.records import NotMeasured
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_results([Path(folder, "ops.csv")], [NotMeasured("ops", "cuda", "no CUDA device")])
        ...     Path(folder, "ops.csv").read_text().splitlines()[1][:40]
        'not_measured,1,ops,cuda,no CUDA device,F'
    """
    for path in paths:
        if path.suffix in FORMATS:
            write_whole(path, FORMATS[path.suffix]([*earlier, *records]))
        else:
            append_results(path, records)


def _append(path: Path, data: bytes) -> None:
    """Append to a file and flush it to the disk; if this fails, the bytes that were written are removed again.

    A last line without an end is given one.
    """
    written = 0
    try:
        with path.open("a+b", buffering=0) as file:
            if data and file.tell():
                file.seek(-1, os.SEEK_END)
                data = data if file.read(1) == b"\n" else b"\n" + data
            try:
                while written < len(data):
                    written += file.write(data[written:])
                os.fsync(file.fileno())
            except OSError:
                if path.stat().st_size == file.tell():  # no other process has appended
                    file.truncate(file.tell() - written)
                raise
    except OSError as error:
        raise ResultsError(f"{len(data)} bytes of results cannot be appended to {path}: {error}") from error


def read_results(path: str | Path, further: Sequence[type[Record]] = ()) -> list[Record]:
    """Read all records of a file of JSON lines; blank lines are skipped.

    Args:
        path: the file.
        further: record classes that the file may have, besides ``RECORDS``.

    Raises:
        ResultsError: if the file cannot be read, or a line is not a record; the message has the file and the line.

    Example:
        >>> import tempfile
        >>> from grasp.bench.records import NotMeasured
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "ops.jsonl")
        ...     append_results(path, [NotMeasured("ops", "cuda", "no CUDA device")])
        ...     [(record.kind, record.provider) for record in read_results(path)]
        [('not_measured', 'cuda')]
    """
    classes = (*RECORDS, *further)
    expected = f"an object of kind {', '.join(c.kind for c in classes)}; repair or remove the line"
    records = []
    for number, line in read_lines(path, "JSON lines of results", ResultsError):
        try:
            records.append(from_dict(parse_json(line, "it", expected, LineError), classes))
        except LineError as error:
            raise ResultsError(f"{path}, line {number}: {error}") from error
    return records
