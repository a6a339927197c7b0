"""Fixtures of the tests of ``grasp bench``: measurements that cost almost nothing, and the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp.bench import conditions
from speedgate import timing
from tests.command_line import Outcome, RunMain, main, save_tiny_model

__all__ = ["main"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 1e-4)
    monkeypatch.setattr(timing, "CPU_BATCH", 1e-4)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, main: RunMain, quick: None) -> RunMain:
    """Run ``grasp bench`` in this process."""
    threads = torch.get_num_threads()
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: object) -> Outcome:
        outcome = main("bench", *arguments)
        assert torch.get_num_threads() == threads
        return outcome

    return run


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random three-layer Llama on disk."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def lines() -> Callable[[Path], list[dict[str, Any]]]:
    """The objects of a file of JSON lines."""
    return lambda path: [json.loads(line) for line in path.read_text().splitlines()]
