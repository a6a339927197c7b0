"""Names of libraries that their documentation does not have: each exists in the installed release."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import pytest

from tests.command_line import ROOT

FOLDERS = ("grasp", "kernels", "packages", "benchmarks", "tests")
LIBRARIES = ("torch", "transformers", "accelerate", "peft", "triton", "kernels", "lm_eval")
# Modules without an underscore that are not documented either.
INTERNAL = (
    "accelerate.utils.offload",
    "lm_eval.api",
    "lm_eval.loggers",
    "lm_eval.models",
    "peft.tuners",
    "torch.utils.flop_counter.sdpa",
    "torch.utils.weak",
    "transformers.activations",
    "transformers.conversion_mapping",
    "transformers.core_model_loading",
    "transformers.dynamic_module_utils",
    "transformers.utils.quantization_config",
    "triton.backends",
    "triton.compiler",
    "triton.runtime",
)


def dotted(node: ast.expr) -> str:
    """``a.b.c`` of an attribute of a name; empty for others."""
    if isinstance(node, ast.Attribute):
        return f"{before}.{node.attr}" if (before := dotted(node.value)) else ""
    return node.id if isinstance(node, ast.Name) else ""


def names(tree: ast.AST) -> Iterator[str]:
    nodes = list(ast.walk(tree))
    imported = {alias.name.split(".")[0] for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute) and (name := dotted(node)).split(".")[0] in imported:
            yield name


def undocumented() -> dict[str, str]:
    """Name → a file that has it."""
    found = {}
    for path in sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")):
        if {"vllm", "sglang", "fake_vllm"} & set(path.parts):  # run in environments of their own
            continue
        for name in names(ast.parse(path.read_text())):
            private = any(part.startswith("_") and not part.endswith("__") for part in name.split("."))
            if name.split(".")[0] in LIBRARIES and (private or name.startswith(INTERNAL)):
                found[name] = str(path.relative_to(ROOT))
    # ``a.b`` is a part of ``a.b.c``
    return {name: path for name, path in found.items() if not any(other.startswith(f"{name}.") for other in found)}


@pytest.mark.parametrize("name", undocumented())
def test_a_name_that_no_documentation_has_exists(name: str) -> None:
    library, *attributes = name.split(".")
    if find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    found: Any = importlib.import_module(library)
    for length, attribute in enumerate(attributes, start=2):
        part = ".".join(name.split(".")[:length])
        try:
            found = getattr(found, attribute) if hasattr(found, attribute) else importlib.import_module(part)
        except ModuleNotFoundError:
            pytest.fail(f"{library} {version(library)} has no {part}, used in {undocumented()[name]}")


def test_they_do_not_become_more() -> None:
    assert len(undocumented()) <= 44, sorted(undocumented())
