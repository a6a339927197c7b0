"""The examples in the docstrings of all public objects: each has one, and each runs."""

from __future__ import annotations

import doctest
import importlib
import re
from pathlib import Path

import pytest

import grasp
import grasp_kernels
from tests.command_line import ROOT
from tests.documents import read

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def documented() -> list[str]:
    """The functions and classes of the API pages, but not the types that are only returned, nor the exceptions."""
    pages = sorted(path.relative_to(ROOT) for path in (ROOT / "docs/api").glob("*.md"))
    text = "\n".join(read(str(page)).split("## Returned values")[0] for page in pages)
    return re.findall(r"^\.\. auto(?:function|class):: ([\w.]+)", text, re.MULTILINE)


def load(name: str) -> object:
    """The object of a dotted name."""
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


NAMES = documented()


def test_the_pages_have_every_public_name() -> None:
    public = {f"{package.__name__}.{name}" for package in (grasp, grasp_kernels) for name in package.__all__}
    assert public - set(NAMES) == {"grasp.__version__", "grasp_kernels.BackendUnavailableError"}


def test_every_documented_name_has_an_example() -> None:
    assert [name for name in NAMES if not _has_example(name)] == []


def _has_example(name: str) -> bool:
    text = load(name).__doc__ or ""
    return ">>> " in text and "Example:" in text


@pytest.mark.parametrize("name", NAMES)
def test_the_examples_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = load(name)
    module = importlib.import_module(getattr(found, "__module__", None) or name.rpartition(".")[0])
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    messages: list[str] = []
    for test in doctest.DocTestFinder(recurse=True).find(found, name, module=module):
        runner.run(test, out=messages.append)
    assert runner.failures == 0, "\n".join(messages)
    assert list(tmp_path.iterdir()) == [], "the example leaves files behind"
