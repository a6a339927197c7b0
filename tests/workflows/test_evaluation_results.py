from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

from grasp.checkpoint.card import model_card, read_evaluation
from grasp.checkpoint.saving import save_checkpoint
from grasp.errors import CheckpointError, GraspError, ResultsError
from grasp.evaluation.lm_eval import TaskRequest
from grasp.model.lowrank_linear import LowRankLinear
from grasp.workflows.evaluate import evaluate
from grasp.workflows.evaluation_results import require_replaceable, write
from tests.command_line import save_tiny_model
from tests.task_documents import write_jsonl
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    card = model_card(model, base_model="owner/model")
    return save_checkpoint(model, tmp_path / "small", tokenizer=tokenizer, card=card)


def test_results_in_the_models_folder_are_in_its_card_beside_those_before_compression(
    folder: Path, tmp_path: Path
) -> None:
    dense = save_tiny_model(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    write_jsonl(tmp_path, "piqa")
    tasks = TaskRequest(("piqa",), tmp_path, limit=2)
    write(evaluate(str(dense), str(tmp_path / "text.txt"), window=64), folder / "before.json")
    both = evaluate(str(folder), str(tmp_path / "text.txt"), tasks=tasks, window=64)
    write(both, folder / "results.json")
    card = (folder / "README.md").read_text()
    assert both.result is not None
    assert f"| perplexity | {both.result.perplexity:.3f} |" in card
    assert card.count("| before compression |") == 1
    assert card.count("| this model |") == 3
    assert [r.metric_type for r in ModelCard(card).data.eval_results] == ["perplexity", "acc", "acc_norm"]  # type: ignore[attr-defined]
    saved = json.loads((folder / "results.json").read_text())
    assert saved["results"]["piqa"]["acc,none"] in (0, 0.5, 1)
    assert saved["grasp"]["result"]["perplexity"] == both.result.perplexity
    assert read_evaluation(folder / "results.json") == saved
    assert read_evaluation(folder / "config.json") is None


@pytest.mark.parametrize(
    "changes",
    [
        {"size": None},
        {"result": {}},
        {"result": {"perplexity": "x", "tokens": 1, "window": 2}},
        {"results": {"piqa": {}}},
        {"results": []},
    ],
    ids=str,
)
def test_a_file_that_only_resembles_a_result_is_none(changes: dict[str, Any], tmp_path: Path) -> None:
    document = {"model": "a", "text": "b", "result": None, "size": {"parameters": 5, "bytes": 20}}
    (tmp_path / "file.json").write_text(json.dumps(document))
    assert read_evaluation(tmp_path / "file.json") == document
    (tmp_path / "file.json").write_text(json.dumps(document | changes))
    assert read_evaluation(tmp_path / "file.json") is None


def test_a_folder_with_texts_of_something_else_is_no_models(tmp_path: Path) -> None:
    for name in ("README.md", "config.json"):
        (tmp_path / name).write_text("of another project")
    require_replaceable(tmp_path / "results.json")


def test_the_card_of_a_dense_model_is_left_to_its_authors(tmp_path: Path) -> None:
    dense = save_tiny_model(tmp_path / "dense")
    (tmp_path / "text.txt").write_text(TEXT)
    (dense / "README.md").write_text("# Theirs\n\n## Evaluation\n\nGood.\n")
    require_replaceable(dense / "results.json")
    write(evaluate(str(dense), str(tmp_path / "text.txt"), window=64), dense / "results.json")
    assert (dense / "README.md").read_text() == "# Theirs\n\n## Evaluation\n\nGood.\n"
    assert str(tmp_path) not in (dense / "results.json").read_text()  # results are published


def test_a_card_that_cannot_show_results_is_said_before_anything_is_measured(folder: Path) -> None:
    (folder / "README.md").write_text("# Mine\n")
    with pytest.raises(CheckpointError, match="no front matter"):
        require_replaceable(folder / "results.json")


def test_a_file_of_another_kind_is_not_replaced(folder: Path, tmp_path: Path) -> None:
    require_replaceable(tmp_path / "new.json")
    with pytest.raises(ResultsError, match="holds no results"):
        require_replaceable(folder / "config.json")
    with pytest.raises(GraspError, match="nowhere"):
        require_replaceable(tmp_path / "nowhere/new.json")
