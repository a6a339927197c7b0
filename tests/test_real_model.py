"""The built-in model through the commands: compressed, loaded by plain transformers, evaluated as the pages say."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import command_line
from tests.documents import blocks, commands, read, run_python
from tests.task_documents import write_jsonl

pytestmark = pytest.mark.slow

TEXT = (
    "The city lies on both banks of the river, and was founded by fishermen in the ninth century. Its first bridge was "
    "built of wood; after the great fire of 1471 the council had it rebuilt in stone.\n" * 4
)
RELOAD = """
from transformers import AutoModelForCausalLM
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))
print(sum(type(module).__name__ == "LowRankLinear" for module in model.modules()))
print(sum(parameter.numel() for parameter in model.parameters()))
"""


def run(folder: Path, *arguments: object) -> dict[str, Any]:
    """What a command prints with ``--json``."""
    process = command_line.grasp(*arguments, "--json", cwd=folder)
    assert process.returncode == 0, process.stderr
    return dict(json.loads(process.stdout))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoint ``small``. The last layer cannot be done without, and few of its parameters go."""
    folder = tmp_path_factory.mktemp("real")
    options = ["--layers", "29", "--retain-ratio", 0.8, "--num-samples", 2, "--seq-len", 32]
    run(folder, "compress", "builtin", "-o", "small", *options)
    return folder


@pytest.fixture
def report(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / "small/report.json").read_text()))


def replaced(report: dict[str, Any]) -> int:
    return sum(not module["reason"] for module in report["modules"])


def test_it_is_compressed_and_inspected(folder: Path, report: dict[str, Any]) -> None:
    assert report["config"]["basis"] == "kfac"  # the default is the best preset
    assert 3 < replaced(report) <= 7
    assert run(folder, "inspect", "small")["parameters"] == report["after"]["parameters"]


def test_plain_transformers_loads_it(folder: Path, report: dict[str, Any]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", RELOAD, "small"]
    process = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr
    generated, layers, parameters = process.stdout.splitlines()
    assert generated.startswith("'The capital of France is")
    assert len(generated) > len("'The capital of France is'") + 5
    assert int(layers) == replaced(report)
    assert int(parameters) == report["after"]["parameters"]


def test_it_is_evaluated_as_the_pages_say(folder: Path) -> None:
    (folder / "text.txt").write_text(TEXT)
    evaluated = run(folder, "evaluate", "small", "--text", "text.txt", "--window", 128)
    assert evaluated["result"]["nonfinite"] == 0
    assert evaluated["result"]["perplexity"] < 100

    write_jsonl(folder / "my-documents", "piqa")
    page = read("docs/evaluate.md")
    for line in commands(page):
        if line.endswith(("small/before.json", "small/results.json")) and "my-documents" in line:
            process = command_line.grasp(*shlex.split(line)[1:], cwd=folder)
            assert process.returncode == 0, process.stderr
    results = json.loads((folder / "small/before.json").read_text())["results"]["piqa"]
    assert results["acc,none"] > 0.5
    card = (folder / "small/README.md").read_text()
    assert "| before compression | `piqa`" in card
    assert "| this model | `piqa`" in card
    for code in blocks(page + read("docs/publish.md"), "python"):
        assert run_python(code, folder).strip()
