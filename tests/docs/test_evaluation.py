"""The commands and the Python of docs/evaluate.md and docs/publish.md."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from grasp.evaluation.task_documents import ARROW_FOLDERS, PACKAGE_REQUIREMENT
from grasp.loading import load_model
from tests.command_line import grasp
from tests.documents import blocks, commands, read, run_python
from tests.evaluation.test_lm_eval import by_hand
from tests.task_documents import write_jsonl

EVALUATE, PUBLISH = read("docs/evaluate.md"), read("docs/publish.md")


def test_what_is_said_of_the_package_is_so() -> None:
    assert PACKAGE_REQUIREMENT in EVALUATE
    assert all(f"`{task}`" in EVALUATE for task in ARROW_FOLDERS)


@pytest.mark.slow
def test_the_commands_for_the_card_and_the_python_run_in_order(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "my-documents", "piqa")
    options = ["--preset", "paper", "--layers", "20", "--num-samples", "2", "--seq-len", "32"]
    run = grasp("compress", "builtin", "-o", "small", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    for line in commands(EVALUATE):
        if line.endswith(("small/before.json", "small/results.json")) and "my-documents" in line:
            run = grasp(*shlex.split(line)[1:], cwd=tmp_path)
            assert run.returncode == 0, run.stderr
    results = json.loads((tmp_path / "small/before.json").read_text())["results"]["piqa"]
    assert (results["acc,none"], results["acc_norm,none"]) == pytest.approx(by_hand(*load_model("builtin")))
    assert results["acc,none"] > 0.5
    card = (tmp_path / "small/README.md").read_text()
    assert "| before compression | `piqa`" in card
    assert "| this model | `piqa`" in card
    for code in blocks(EVALUATE + PUBLISH, "python"):
        assert run_python(code, tmp_path).strip()
