from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import vllm_server
from benchmarks.serving.vllm_server import Load, compare, log_probabilities
from grasp.bench import conditions
from tests.command_line import save_tiny_model


class FakeServer:
    """Answers as vLLM does, with the log-probabilities of transformers plus ``shift``."""

    def __init__(self, folder: Path, shift: float = 0.0) -> None:
        self.folder, self.shift = folder, shift

    @contextmanager
    def running(self) -> Iterator[None]:
        yield

    def ask(self, *, prompt: list[int], max_tokens: int, stream: bool = False, **_: Any) -> BytesIO:
        if stream:
            usage = {"usage": {"completion_tokens": max_tokens}}
            return BytesIO(f"data: {{}}\n\ndata: {json.dumps(usage)}\n\ndata: [DONE]\n".encode())
        values = (log_probabilities(self.folder, "float32", prompt) + self.shift).tolist()
        return BytesIO(json.dumps({"choices": [{"logprobs": {"token_logprobs": [None, *values]}}]}).encode())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(vllm_server, "version", lambda name: "0.0")
    monkeypatch.setattr(vllm_server, "SCORED_TOKENS", 32)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    return save_tiny_model(tmp_path / "model")


def test_all_servers_are_timed_under_all_loads(folder: Path) -> None:
    servers: Any = {"dense": FakeServer(folder), "small": FakeServer(folder)}
    results = list(compare(servers, [Load(1, 4, 2), Load(3, 4, 2)], 2, "model", "float32"))
    assert [(result.load.clients, result.provider) for result in results] == [
        (clients, name) for clients in (1, 3) for name in servers
    ]
    assert results[0].speedup_over_dense == results[0].first_token_speedup_over_dense == 1
    assert all(result.output_tokens_per_s > 0 and result.weight_bytes > 0 for result in results)


def test_a_server_with_wrong_log_probabilities_is_not_timed(folder: Path) -> None:
    servers: Any = {"dense": FakeServer(folder, shift=0.1)}
    with pytest.raises(RuntimeError, match="other log-probabilities"):
        list(compare(servers, [Load(1, 4, 2)], 2, "model", "float32"))
