"""Files of benchmark results: one JSON object a line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from grasp.bench.records import RECORDS
from grasp.bench.schema import LineError, Record, parse
from grasp.errors import ResultsError


def append_results(path: Path | None, records: Sequence[Record]) -> None:
    """Append records to a file as JSON lines, in one write; ``None`` is no file.

    Raises:
        ValueError: if a number is NaN or infinite, which JSON does not have.
        OSError: if the file cannot be written.

    Example:
        >>> import tempfile
        >>> from grasp.bench.records import NotMeasured
        >>> left_out = NotMeasured("ops", "cuda", "no CUDA device")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     append_results(Path(folder, "ops.jsonl"), [left_out])
        ...     read_results(Path(folder, "ops.jsonl")) == [left_out]
        True
    """
    if path is None or not records:
        return
    text = "".join(json.dumps(record.to_dict(), allow_nan=False) + "\n" for record in records)
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def check_output(path: Path | None, further: Sequence[type[Record]] = ()) -> None:
    """Check that results can be appended to a file, before hours are spent. The file is not changed.

    Args:
        path: the file; ``None`` is no file.
        further: record classes that the file may have, besides ``RECORDS``.

    Raises:
        ResultsError: if the file holds anything but results, or its folder is missing.
    """
    if path is None:
        return
    if path.exists():
        read_results(path, further)
    elif not path.parent.is_dir():
        raise ResultsError(f"results cannot be written to {path}: there is no folder {path.parent}; make it first")


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
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ResultsError(f"{path} cannot be read as JSON lines of results: {error}") from error
    records = []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                records.append(parse(line, (*RECORDS, *further)))
            except LineError as error:
                raise ResultsError(f"{path}, line {number}: {error}") from error
    return records
