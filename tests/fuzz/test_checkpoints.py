"""Damaged checkpoints through plain transformers and the commands: the result of the files, or a refusal in one line.

The readers run in a process of their own with limited memory. It is a failure if it dies or takes too long, if code of
the checkpoint runs, if a command ends with another code than 0 and 2, or prints a traceback, control characters or the
token.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from torch import nn

from grasp.checkpoint.card import model_card
from grasp.checkpoint.recovery_report import Point, RecoveryReport
from grasp.checkpoint.saving import save_checkpoint
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.method.storage import Storage
from grasp.model.lowrank_linear import LowRankLinear
from tests.command_line import environment
from tests.forked import CONTEXT, start_server
from tests.fuzz import damage
from tests.fuzz.checkpoint_worker import serve
from tests.quantized_models import random_like
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

CASES, SHORT = 2000, len(damage.KINDS)
SECONDS = 120  # of one case; a slow machine shares its cores
QUICK = ("AutoModel", "inspect", "evaluate", "push")
READERS = (*QUICK, "recover", "report", "convert")


class Worker:
    """The process that reads checkpoints; it is started again after it has died."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.process: Any = None

    def ask(self, folder: Path, readers: list[str]) -> dict[str, str]:
        """The outcome of each reader, or ``{"worker": the failure}``."""
        if self.process is None:
            start_server(environment())
            self.connection, other = CONTEXT.Pipe()
            self.process = CONTEXT.Process(target=serve, args=(other, self.place))
            self.process.start()
            other.close()
        self.connection.send((folder, readers))
        try:
            if self.connection.poll(SECONDS):
                outcomes: dict[str, str] = self.connection.recv()
                return outcomes
            failure = "FAULT hung"
        except EOFError:
            failure = "FAULT died"
        self.stop()
        return {"worker": failure}

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


@pytest.fixture(scope="module")
def worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Worker]:
    started = Worker(tmp_path_factory.mktemp("worker"))
    yield started
    started.stop()


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of layer 0 the MLP is quantised, like the embedding; of the others the attention is pivoted, the MLP factored."""
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(1, 2), retain_ratio=0.5))
    for name, module in model.named_modules():
        if isinstance(module, LowRankLinear) and "self_attn" in name:
            assert module.pivot_() is None
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and ".0.mlp" in name):
            model.set_submodule(name, random_like(module, Storage(8) if "embed" in name else Storage(4, 32)))
    recovery = RecoveryReport({}, 7, 10, steps=1, curve=(Point(0, 0, 3.5, None),), best_step=0, data={})
    return save_checkpoint(
        model,
        tmp_path_factory.mktemp("models") / "small",
        tokenizer=tokenizer,
        card=model_card(model, base_model="somebody/model"),
        extra_files={"report.json": report.to_json(), "recovery.json": recovery.to_json()},
    )


def damaged(original: Path, place: Path, number: int) -> tuple[Path, str]:
    """The folder of a case, and what was done to it; a case depends on its number only."""
    random = Random(number)
    folder = Path(shutil.copytree(original, place / f"case-{number}"))
    return folder, damage.KINDS[number % len(damage.KINDS)](folder, random)


def believes_sizes(folder: Path) -> bool:
    """Whether the configuration has sizes for which plain transformers takes unlimited time or memory."""
    try:
        config = json.loads((folder / "config.json").read_text()) if (folder / "config.json").is_file() else {}
    except (OSError, ValueError, RecursionError):
        return False
    numbers = config.items() if isinstance(config, dict) else ()
    return any(
        isinstance(value, (int, float)) and value > 10_000 and any(word in key for word in damage.SIZES)
        for key, value in numbers
    )


def outcomes(
    worker: Worker, original: Path, place: Path, number: int, names: tuple[str, ...]
) -> tuple[str, dict[str, str]]:
    """The outcome of each reader for a case."""
    folder, description = damaged(original, place, number)
    skipped = {"AutoModel"} if believes_sizes(folder) else set()
    if "report.json" not in description and number % 10:  # the page takes most of the time, and reads no other file
        skipped.add("report")
    return description, ask(worker, folder, [name for name in names if name not in skipped])


def ask(worker: Worker, folder: Path, readers: list[str]) -> dict[str, str]:
    """The outcome of each reader; the folder is removed."""
    place = folder.parent
    results = worker.ask(folder, readers)
    if (place / "ran").exists():
        results["sentinel"] = "FAULT code was run"
        (place / "ran").unlink()
    for path in place.glob(f"{folder.name}*"):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    return results


def test_a_damaged_checkpoint_gives_its_result_or_a_refusal(
    fuzzing: bool, worker: Worker, original: Path, tmp_path: Path
) -> None:
    whole = worker.ask(original, list(READERS if fuzzing else QUICK))
    assert {outcome.split()[0] for outcome in whole.values()} == {"accepted"}, whole
    start, count = int(os.environ.get("FUZZ_START", 0)), int(os.environ.get("FUZZ_COUNT", CASES if fuzzing else SHORT))
    counts: Counter[tuple[str, str]] = Counter()
    faults = []
    for number in range(start, start + count):
        description, results = outcomes(worker, original, tmp_path, number, READERS if fuzzing else QUICK)
        for reader, outcome in results.items():
            word = outcome.split()[0]
            counts[reader, "same" if outcome == whole.get(reader) else word] += 1
            if word == "FAULT":
                faults.append(f"case {number}, {description}, {reader}: {outcome}")
                print(faults[-1], flush=True)
    print({f"{reader} {word}": number for (reader, word), number in sorted(counts.items())})
    assert not faults, "\n".join(faults[:20])


@pytest.mark.parametrize("kind", damage.CORPUS)
def test_damage_that_once_ended_a_command_is_refused(worker: Worker, original: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(original, tmp_path / "case"))
    damage.CORPUS[kind](folder)
    for outcome in ask(worker, folder, kind.partition(": ")[0].split(", ")).values():
        assert outcome.startswith("refused")
