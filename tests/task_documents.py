"""A few documents of each task, written for the tests in the columns of the real data sets, and files of them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow

from grasp.evaluation.task_documents import ARROW_FOLDERS


def _science(question: str, right: str, *wrong: str, key: str = "question") -> dict[str, Any]:
    texts = sorted([right, *wrong])
    letters = ["A", "B", "C", "D"][: len(texts)]
    return {key: question, "choices": {"text": texts, "label": letters}, "answerKey": letters[texts.index(right)]}


_SCIENCE = [
    _science("Which of these is a source of light?", "the Sun", "a stone", "a cloud", "the ground"),
    _science("What do plants take up with their roots?", "water", "light", "sound", "smoke"),
    _science("Which animal lays eggs?", "a hen", "a horse", "a dog", "a whale"),
]

DOCUMENTS: dict[str, list[dict[str, Any]]] = {
    "piqa": [
        {"goal": "Cool a cup of tea.", "sol1": "Blow over the cup.", "sol2": "Put the cup into a fire.", "label": 0},
        {"goal": "Open a tin.", "sol1": "Use a feather.", "sol2": "Use a tin opener.", "label": 1},
        {"goal": "Dry wet hair.", "sol1": "Rub it with a towel.", "sol2": "Rub it with a wet sponge.", "label": 0},
        {"goal": "Keep milk fresh.", "sol1": "Leave it in the sun.", "sol2": "Put it in the fridge.", "label": 1},
        {"goal": "Sweep the floor.", "sol1": "Use a broom.", "sol2": "Use a spoon.", "label": 0},
        {"goal": "Light a candle", "sol1": "Hold ice to the wick.", "sol2": "Hold a match to the wick.", "label": 1},
    ],
    "hellaswag": [
        {
            "activity_label": "Baking bread",
            "ctx_a": "A woman stands in a kitchen. [title] She mixes flour and water.",
            "ctx_b": "she",
            "ctx": "unused",
            "endings": ["kneads the dough.", "paints a boat.", "rides a horse.", "reads [step] a map."],
            "label": "0",
        },
        {
            "activity_label": "Playing football",
            "ctx_a": "A boy runs on a field with a ball.",
            "ctx_b": "the boy",
            "ctx": "unused",
            "endings": ["eats soup.", "kicks the ball.", "sleeps.", "plants a tree."],
            "label": "1",
        },
    ],
    "winogrande": [
        {
            "sentence": "The cup did not fit in the box as the _ was too big.",
            "option1": "cup",
            "option2": "box",
            "answer": "1",
        },
        {"sentence": "Ann thanked Eve, as _ had helped her.", "option1": "Ann", "option2": "Eve", "answer": "2"},
    ],
    "arc_easy": _SCIENCE,
    "arc_challenge": _SCIENCE[:2],
    "openbookqa": [_science("A hot day makes you", "sweat", "freeze", "shrink", "glow", key="question_stem")],
    "boolq": [
        {"passage": "Snow is frozen water.", "question": "is snow made of water", "answer": True},
        {"passage": "A bat is a mammal.", "question": "is a bat a bird", "answer": False},
    ],
    "sciq": [
        {
            "support": "  Iron rusts in damp air.",
            "question": "What rusts in damp air?",
            "distractor1": "gold",
            "distractor2": "glass",
            "distractor3": "wood",
            "correct_answer": "iron",
        }
    ],
    "copa": [
        {
            "premise": "It rained.",
            "choice1": "The road got wet.",
            "choice2": "The road sang.",
            "question": "effect",
            "label": 0,
        }
    ],
    "cb": [{"premise": "It is raining.", "hypothesis": "It is dry", "label": 1}],
    "rte": [{"sentence1": "Ann has two dogs.", "sentence2": "Ann has a dog.", "label": 0}],
    "mrpc": [{"sentence1": "He left early .", "sentence2": "He went early .", "label": 1}],
    "sst2": [{"sentence": "a charming film ", "label": 1}],
    "commonsense_qa": [
        {
            "question": "Where do you sleep?",
            "choices": {"label": ["A", "B", "C", "D", "E"], "text": ["bed", "lake", "road", "tree", "oven"]},
            "answerKey": "A",
        }
    ],
    "social_iqa": [
        {
            "context": "Ann fell.",
            "question": "How does Ann feel?",
            "answerA": "hurt",
            "answerB": "rich",
            "answerC": "tall",
            "label": "1",
        }
    ],
}


def write_jsonl(folder: Path, task: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{task}.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in DOCUMENTS[task]), encoding="utf-8")
    return file


def write_arrow(folder: Path, task: str, split: str, rows: Sequence[dict[str, Any]] | None = None) -> Path:
    """As ``datasets.Dataset.save_to_disk`` writes it: a stream of Arrow records."""
    file = folder / ARROW_FOLDERS[task] / split / "data-00000-of-00001.arrow"
    file.parent.mkdir(parents=True)
    table = pyarrow.Table.from_pylist(list(rows or DOCUMENTS[task]))
    with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return file
