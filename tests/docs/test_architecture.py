"""docs/architecture.md says what the import contract says, and names files that exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

from tests.command_line import ROOT
from tests.documents import read, sections

PAGE = read("docs/architecture.md")


def figure() -> ModuleType:
    """The script that draws the figure."""
    spec = importlib.util.spec_from_file_location("architecture_figure", ROOT / "docs/architecture_figure.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_equals_the_import_contract() -> None:
    rows = re.findall(r"^\| (\d+) \| `(grasp\.\w+)` \| .+ \|$", PAGE, re.MULTILINE)
    contract = figure().layers()
    assert rows == [(str(number), package) for number, layer in enumerate(contract, start=1) for package in layer]


def test_the_figure_is_drawn_from_the_import_contract() -> None:
    drawn = figure()
    assert drawn.FIGURE.read_text(encoding="utf-8") == drawn.draw(), "run: python docs/architecture_figure.py"


def test_every_module_has_a_layer() -> None:
    modules = {
        path.stem for path in (ROOT / "grasp").iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
    }
    in_contract = {package.removeprefix("grasp.") for layer in figure().layers() for package in layer}
    assert modules - in_contract == {"__init__", "__main__"}
    assert in_contract <= modules


def test_every_file_named_exists() -> None:
    for page in ("docs/architecture.md", "CONTRIBUTING.md"):
        for path in re.findall(r"`((?:grasp|kernels|csrc|docs|tests|benchmarks|examples)/[\w./-]*)`", read(page)):
            assert (ROOT / path).exists(), f"{page} names {path}"


def test_every_table_named_exists() -> None:
    for table, path in re.findall(r"`([A-Z_]{4,})` in `([\w./]+\.py)`", PAGE):
        assert re.search(rf"^{table}\b", read(path), re.MULTILINE), f"{path} has no {table}"


def test_every_function_and_class_on_the_paths_exists() -> None:
    paths = "".join(text for heading, text in sections(PAGE).items() if heading.startswith("The path of"))
    files = [*(ROOT / "grasp").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    defined = set(re.findall(r"^(?:def|class) (\w+)", "\n".join(map(Path.read_text, files)), re.MULTILINE))
    named = set(re.findall(r"`(\w+)`", paths)) - {"best", "cpu", "s"}
    assert len(named) > 10
    assert named <= defined, sorted(named - defined)
