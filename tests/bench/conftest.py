"""Fixtures of the tests of ``grasp bench``: measurements that cost almost nothing, and the command line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from grasp import cli
from grasp.bench import conditions
from grasp.cli import root
from speedgate import timing
from tests.command_line import save_tiny_model


class Outcome(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def text(self) -> str:
        """The output, without the line breaks of the terminal."""
        return " ".join(self.out.split())


RunBench = Callable[..., Outcome]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1e-4)
    monkeypatch.setattr(timing, "CPU_BATCH", 1e-4)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], quick: None) -> Iterator[RunBench]:
    """Run ``grasp bench`` in this process, and restore the settings of libraries that it changes."""
    verbosity, hub = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    threads = torch.get_num_threads()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "200")
    for name, value in root.QUIET.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["grasp", "bench", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert torch.get_num_threads() == threads
        return Outcome(ended.value.code, *capfd.readouterr())  # type: ignore[arg-type]

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    hub_logging.set_verbosity(hub)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer Llama on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The objects of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]
