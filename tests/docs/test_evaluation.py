"""The commands and the Python of docs/evaluate.md and docs/publish.md."""

from __future__ import annotations

from grasp.evaluation.task_documents import ARROW_FOLDERS, PACKAGE_REQUIREMENT, REQUEST_FILES
from tests.documents import read

EVALUATE, PUBLISH = read("docs/evaluate.md"), read("docs/publish.md")


def test_what_is_said_of_the_package_is_so() -> None:
    assert PACKAGE_REQUIREMENT in EVALUATE
    assert all(f"`{task}`" in EVALUATE for task in (*ARROW_FOLDERS, *REQUEST_FILES))
