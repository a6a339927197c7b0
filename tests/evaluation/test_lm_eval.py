from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from grasp.errors import MissingPackageError, TaskError
from grasp.evaluation import lm_eval as module
from grasp.evaluation.lm_eval import TaskRequest, definitions, evaluate_tasks
from grasp.evaluation.task_documents import ARROW_FOLDERS
from grasp.formatting import score_rows
from grasp.loading import load_model
from grasp.model.lowrank_linear import LowRankLinear
from tests.command_line import grasp, save_tiny_model
from tests.task_documents import DOCUMENTS, write_arrow, write_jsonl
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Tiny, one linear low-rank and pivoted."""
    model = tiny_model("llama", vocab_size=len(byte_tokenizer())).eval()
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    assert model.get_submodule(name).pivot_() is None
    return model


def log_likelihood(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, answer: str) -> float:
    """ln P(answer | context), by one plain forward pass."""
    start = len(tokenizer(context)["input_ids"])
    ids = torch.tensor([tokenizer(context + answer)["input_ids"]])
    with torch.no_grad():
        log_probabilities = model(input_ids=ids).logits[0].double().log_softmax(-1)
    return sum(log_probabilities[at - 1, ids[0, at]].item() for at in range(start, ids.shape[1]))


def by_hand(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[float, float]:
    """Accuracy on the PIQA documents: by log-likelihood, and by log-likelihood per byte of the answer."""
    right = right_per_byte = 0
    for row in DOCUMENTS["piqa"]:
        answers = [row["sol1"], row["sol2"]]
        context = f"Question: {row['goal']}\nAnswer:"
        scores = [log_likelihood(model, tokenizer, context, f" {answer}") for answer in answers]
        per_byte = [score / len(answer.encode()) for score, answer in zip(scores, answers, strict=True)]
        right += scores.index(max(scores)) == row["label"]
        right_per_byte += per_byte.index(max(per_byte)) == row["label"]
    return right / len(DOCUMENTS["piqa"]), right_per_byte / len(DOCUMENTS["piqa"])


def by_lm_eval(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str) -> dict[str, Any]:
    """The same documents through lm-eval alone: its definition, with the documents handed over in memory."""
    from datasets import Dataset, DatasetDict
    from lm_eval import simple_evaluate
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    rows = Dataset.from_list(DOCUMENTS[task])
    config = load_yaml(definitions()[task])
    splits = {config[key] for key in ("training_split", "validation_split", "test_split") if config.get(key)}
    config["custom_dataset"] = lambda **_: DatasetDict(dict.fromkeys(splits, rows))
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)
    manager = TaskManager(include_defaults=False)  # else it reads all definitions, which takes long
    results = simple_evaluate(model=lm, tasks=[ConfigurableTask(config=config)], task_manager=manager)
    scores: dict[str, Any] = results["results"][task]
    return scores


def test_scores_are_lm_evals_own_and_those_of_plain_log_likelihoods(model: PreTrainedModel, tmp_path: Path) -> None:
    for task in ("piqa", "hellaswag", "winogrande"):
        write_jsonl(tmp_path, task)
    tokenizer = byte_tokenizer()
    done: list[tuple[int, int]] = []
    results = evaluate_tasks(
        *(model, tokenizer, ["piqa", "hellaswag", "winogrande"], tmp_path),
        progress=lambda step, count, total: done.append((count, total)),
    )
    for task, scores in results["results"].items():
        assert scores == by_lm_eval(model, tokenizer, task)
    piqa = results["results"]["piqa"]
    assert (piqa["acc,none"], piqa["acc_norm,none"]) == pytest.approx(by_hand(model, tokenizer))
    assert results["versions"] == {"piqa": 1.0, "hellaswag": 1.0, "winogrande": 1.0}
    assert results["n-shot"] == {"piqa": 0, "hellaswag": 0, "winogrande": 0}
    assert results["n-samples"]["piqa"] == {"original": 6, "effective": 6}
    assert results["configs"]["piqa"]["dataset_path"] == "piqa.jsonl"
    assert str(tmp_path) not in json.dumps(results)  # results are published
    assert results["config"]["model_num_parameters"] == model.num_parameters()
    assert json.loads(json.dumps(results)) == results
    answers = 6 * 2 + 2 * 4 + 2 * 2
    assert done[-1] == (answers, answers)
    assert all(count < total for count, total in done[:-1])


def test_every_task_that_the_package_carries_runs_on_its_definition(model: PreTrainedModel, tmp_path: Path) -> None:
    assert ARROW_FOLDERS.keys() == DOCUMENTS.keys()
    for task in ARROW_FOLDERS:
        write_arrow(tmp_path, task, "validation")
    results = evaluate_tasks(model, byte_tokenizer(), list(ARROW_FOLDERS), tmp_path, limit=1, batch_size=4)
    for task in ARROW_FOLDERS:
        assert results["n-samples"][task] == {"original": len(DOCUMENTS[task]), "effective": 1}
        assert results["results"][task]["acc,none"] in (0, 1)
        assert results["configs"][task]["test_split"] == "validation"
    shown = score_rows(results)
    assert {row[0] for row in shown} == set(ARROW_FOLDERS)
    assert ("sciq", "1", "0", "acc") in {row[:4] for row in shown}


def test_standard_output_is_left_to_the_results(
    model: PreTrainedModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """lm-eval says on it which metrics it draws samples for, such as perplexity."""
    (tmp_path / "lambada_openai.jsonl").write_text('{"text": "He took the train"}\n{"text": "It ran"}\n')
    seen: list[tuple[str, int, int]] = []
    results = evaluate_tasks(
        *(model, byte_tokenizer(), ["lambada_openai"], tmp_path), progress=lambda *step: seen.append(step)
    )
    assert results["results"]["lambada_openai"]["perplexity_stderr,none"] > 0
    assert seen[-1] == ("tasks", 2, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "Tokenizing" not in shown.err


def test_the_same_file_name_with_other_documents_is_read_again(model: PreTrainedModel, tmp_path: Path) -> None:
    counts = []
    for rows in (DOCUMENTS["piqa"], DOCUMENTS["piqa"][:2]):
        (tmp_path / "piqa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        results = evaluate_tasks(model, byte_tokenizer(), ["piqa"], tmp_path)
        counts.append(results["n-samples"]["piqa"]["original"])
    assert counts == [6, 2]


@pytest.mark.parametrize(
    ("task", "row", "message"),
    [
        ("piqa", {"goal": "a", "answer": "b"}, "goal, answer"),
        ("gsm8k", {"question": "1 + 1?", "answer": "#### 2"}, r"gsm8k .* \d+ solved examples"),
        ("piqa", {"goal": "Count.", "sol1": "one " * 100, "sol2": "two", "label": 0}, "128 positions"),
        ("triviaqa", {"question": "Who?", "answer": {"value": "he", "aliases": ["he"]}}, "128 positions"),
    ],
    ids=["other columns", "solved examples", "an answer longer than the model reads", "longer than it writes"],
)
def test_documents_that_a_task_cannot_be_measured_on_are_refused(
    model: PreTrainedModel, tmp_path: Path, task: str, row: dict[str, object], message: str
) -> None:
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match=message):
        evaluate_tasks(model, byte_tokenizer(), [task], tmp_path)


def test_a_task_of_whole_texts_has_a_perplexity(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "wikitext.jsonl").write_text(json.dumps({"page": "A man walks home. He is tired. " * 12}) + "\n")
    seen: list[tuple[str, int, int]] = []
    results = evaluate_tasks(model, byte_tokenizer(), ["wikitext"], tmp_path, progress=lambda *step: seen.append(step))
    assert seen == [("tasks", 0, 1), ("tasks", 1, 1)]
    assert results["results"]["wikitext"]["byte_perplexity,none"] > 1


@pytest.mark.parametrize("task", ["piqa", "arc_easy"])
def test_a_label_that_is_withheld_is_not_taken_for_the_last_answer(
    model: PreTrainedModel, tmp_path: Path, task: str
) -> None:
    row = {"query": "Question: Which?\n", "choices": ["this", "that"], "gold": -1}
    (tmp_path / f"{task}.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(TaskError, match="gold is -1 of 2 choices"):
        evaluate_tasks(model, byte_tokenizer(), [task], tmp_path)


def test_tokens_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "piqa")
    with pytest.raises(TaskError, match="the model has 60 tokens"):
        evaluate_tasks(tiny_model("llama", vocab_size=60), byte_tokenizer(), ["piqa"], tmp_path)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'baber/piqa' on the Hub"),
        RuntimeError("Dataset scripts are no longer supported, but found piqa.py"),
    ],
)
def test_documents_that_the_hub_does_not_give_are_reported_with_what_to_do(
    error: Exception, model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    import datasets

    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(TaskError, match=r"documents of piqa cannot be fetched .*--tasks-from"):
        evaluate_tasks(model, byte_tokenizer(), ["piqa"])


@pytest.mark.parametrize(
    ("request_", "words"),
    [
        (TaskRequest(()), "got no task"),
        (TaskRequest(("piqa",), limit=0), "limit must be at least 1, got 0"),
        (TaskRequest(("piqaa",), "."), r"no task 'piqaa'; .* piqa"),
        (TaskRequest(("mmlu",), "."), "mmlu is a group"),
        (TaskRequest(("piqa",), "nowhere"), "no folder nowhere"),
        (TaskRequest(("piqa",), "."), "has no documents of piqa"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused_before_a_model_is_loaded(
    request_: TaskRequest, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=words):
        request_.check()


def test_damaged_documents_are_refused_before_a_model_is_loaded(tmp_path: Path) -> None:
    write_jsonl(tmp_path, "piqa").write_text('{"goal": \n')
    with pytest.raises(TaskError, match=r"piqa\.jsonl, line 1"):
        TaskRequest(("piqa",), tmp_path).check()


def test_an_unknown_task_of_the_hub_may_be_a_tag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_all_names", lambda: ["piqa", "ai2_arc"])
    TaskRequest(("ai2_arc",)).check()
    with pytest.raises(TaskError, match=r"no task 'arc_eazy'; .* arc_easy"):
        TaskRequest(("ai2_arc", "arc_eazy")).check()


def test_a_missing_or_old_package_is_said_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "version", lambda name: "3.6.0")
    with pytest.raises(MissingPackageError, match=r"datasets 3\.6\.0 .* pip install"):
        TaskRequest(("piqa",)).check()
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"pip install 'lm-eval"):
        TaskRequest(("piqa",)).check()


def test_the_tokenizer_stays_as_it_was(model: PreTrainedModel, tmp_path: Path) -> None:
    write_jsonl(tmp_path, "sciq")
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = None
    evaluate_tasks(model, tokenizer, ["sciq"], tmp_path)
    assert tokenizer.pad_token is None


@pytest.mark.slow
def test_the_command_gives_the_scores_that_plain_log_likelihoods_give(tmp_path: Path) -> None:
    """tests/test_real_model.py runs it with the real model."""
    save_tiny_model(tmp_path / "tiny")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    write_jsonl(tmp_path, "piqa")
    options = ["--tasks", "piqa", "--tasks-from", ".", "--text", text, "--window", 64, "-o", "results.json"]
    run = grasp("evaluate", "tiny", *options, cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert "fatal" not in run.stderr
    assert "Running loglikelihood" not in run.stderr
    assert "Traceback" not in run.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    model, tokenizer = load_model(str(tmp_path / "tiny"))
    piqa = results["results"]["piqa"]
    assert (piqa["acc,none"], piqa["acc_norm,none"]) == pytest.approx(by_hand(model, tokenizer))
    assert math.isfinite(results["grasp"]["result"]["perplexity"])
    assert f"{piqa['acc,none']:.4f}" in run.stdout
    assert "perplexity" in run.stdout
