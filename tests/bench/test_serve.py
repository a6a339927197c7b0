from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from grasp.bench import servers
from grasp.bench.results import read_results
from grasp.bench.serve import ServeRequest, run
from grasp.bench.serve_records import ServeResult
from grasp.bench.servers import COMMAND, Process, free_port, start
from grasp.errors import MissingPackageError, ServerError
from tests.command_line import RunMain
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

FAKE = Path(__file__).parent / "fake_vllm"
SIZES = ("--prompt-tokens", 8, "--new-tokens", 4)


@pytest.fixture
def vllm(monkeypatch: pytest.MonkeyPatch, quick: None) -> None:
    """A package that takes the place of vLLM in this process and in its children."""
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.setenv("PYTHONPATH", str(FAKE))
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy is for other machines
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(servers, "_GRACE_SECONDS", 0.2)
    monkeypatch.setattr(servers, "_POLL_SECONDS", 0.02)


@pytest.fixture
def save(tmp_path: Path, vllm: None) -> Callable[..., Path]:
    """Save a tiny model all of whose tokens are equally likely, unless it is ``wrong``."""

    def saved(name: str, *, wrong: bool = False, fault: str = "") -> Path:
        model = tiny_model("llama", vocab_size=len(byte_tokenizer()))
        if not wrong:
            torch.nn.init.zeros_(model.get_output_embeddings().weight)
        for part in (model, byte_tokenizer()):
            part.save_pretrained(tmp_path / name)
        if fault:
            (tmp_path / name / "fault").write_text(fault)
        return tmp_path / name

    return saved


def remaining(folder: Path) -> list[int]:
    """The processes of a folder's server that still run; a process that was killed may take a moment."""
    pids = [int(pid) for pid in (folder / "processes").read_text().split()]
    deadline = time.monotonic() + 5
    while (alive := [pid for pid in pids if is_running(pid)]) and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive


def is_running(pid: int) -> bool:
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_servers_take_turns_and_are_compared_with_the_first(
    save: Callable[..., Path], bench: RunMain, tmp_path: Path
) -> None:
    folders, output = [save("dense"), save("small"), save("other", wrong=True)], tmp_path / "serve.jsonl"
    options = ("--concurrency", "1,3", "--requests", 2, "--rounds", 2, "--goodput", "ttft:200,tpot:50", *SIZES)
    outcome = bench("serve", *folders, *options, "-o", output)
    assert outcome.code == 1
    assert "WRONG: other at every concurrency: log-probabilities are" in outcome.text
    refused, *results = read_results(output)
    assert refused.provider == "other"  # type: ignore[attr-defined]
    assert [(line.provider, line.concurrency) for line in results] == [  # type: ignore[attr-defined]
        (name, concurrency) for concurrency in (1, 3) for name in ("dense", "small")
    ]
    dense, small = [line for line in results if isinstance(line, ServeResult) and line.concurrency == 3]
    assert (dense.throughput_speedup, small.throughput_speedup) == (1, 2)
    assert (small.requests, small.output_tokens_per_s, small.good_requests_per_s) == (6, 12, 1.5)
    assert small.first_token_ms.p95 == 95.5  # median of the rounds
    assert small.limits == {"ttft": 200, "tpot": 50}
    assert small.log_probability_error == pytest.approx(0, abs=1e-6)
    assert (small.dtype, small.vllm, small.conditions.threads) == ("float32", "0.0", None)
    assert "std_ttft_ms" not in small.client[0]
    starts = {number["started"]: line.provider for line in (dense, small) for number in line.client}
    assert [starts[moment] for moment in sorted(starts)] == ["dense", "small", "small", "dense"]
    assert "good within ttft 200 ms, tpot 50 ms" in outcome.text
    assert [remaining(folder) for folder in folders] == [[], [], []]


def test_a_server_that_runs_already_is_timed_and_goes_on(save: Callable[..., Path], tmp_path: Path) -> None:
    folder, port = save("running"), free_port()
    arguments = ("--model", str(folder), "--served-model-name", "running", "--port", str(port))
    url = f"http://localhost:{port}"
    with Process([*COMMAND, *arguments], tmp_path / "log", offline=True) as process:
        start(process, "running", url, limit=60)
        request = ServeRequest([f"{url}/v1/"], (1,), 1, prompt_tokens=8, new_tokens=4, rounds=1, tokenizer=str(folder))
        (result,) = [line for records in run(request) for line in records]
        assert isinstance(result, ServeResult)
        assert (result.model, result.provider, result.dtype) == ("running", "running", None)
        assert result.log_probability_error is None
        assert result.conditions is None  # it may run on another machine
        assert process.exit_code is None
    assert remaining(folder) == []


def test_a_server_that_ends_before_it_answers_is_an_error_with_its_last_lines(save: Callable[..., Path]) -> None:
    good, bad = save("good"), save("bad", fault="dies")
    message = r"server of bad ended with exit code 3; its last lines: loading \| ValueError: a tensor is missing"
    with pytest.raises(ServerError, match=message):
        list(run(ServeRequest([str(good), str(bad)], prompt_tokens=8, new_tokens=4)))
    assert remaining(good) == remaining(bad) == []


def test_a_server_that_never_answers_is_ended_after_the_time_limit(
    save: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = save("bad", fault="hangs")
    clock = SimpleNamespace(monotonic=lambda: 1000.0 if (bad / "processes").exists() else 0.0, sleep=time.sleep)
    monkeypatch.setattr(servers, "time", clock)
    with pytest.raises(ServerError, match=r"server of bad does not answer after 900 s.*--time-limit.*lines: loading$"):
        list(run(ServeRequest([str(bad)], prompt_tokens=8, new_tokens=4)))
    assert remaining(bad) == []


def test_a_signal_ends_the_servers(save: Callable[..., Path], bench: RunMain) -> None:
    bad = save("bad", fault="hangs")

    def end() -> None:
        while not (bad / "processes").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=end)
    thread.start()
    outcome = bench("serve", bad, *SIZES)
    thread.join()
    assert (outcome.code, outcome.err.splitlines()[-1]) == (130, "interrupted")
    assert remaining(bad) == []
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize(
    ("prompt_tokens", "message"),
    [
        (7, "completed 1 requests with 3 tokens; expected 1 with 4; HTTP 400"),
        (9, "the client .* exit code 1.*no such tokenizer"),
    ],
)
def test_a_client_that_fails_or_reports_missing_tokens_is_an_error(
    prompt_tokens: int, message: str, save: Callable[..., Path]
) -> None:
    folder = save("model")
    with pytest.raises(ServerError, match=message):
        list(run(ServeRequest([str(folder)], (1,), 1, prompt_tokens=prompt_tokens, new_tokens=4, rounds=1)))
    assert remaining(folder) == []


def test_what_cannot_be_served_is_refused_before_a_server_starts(
    save: Callable[..., Path], bench: RunMain, tmp_path: Path
) -> None:
    folder = save("model")
    twin = tmp_path / "twin" / "model"
    twin.parent.mkdir()
    twin.symlink_to(folder)
    refusals: dict[tuple[Any, ...], str] = {
        (folder, twin, *SIZES): "need different names",
        (folder, tmp_path, *SIZES): "has no config.json",
        ("~nobody-of-this-name/model", *SIZES): "~nobody-of-this-name/model",
        (f"http://127.0.0.1:{free_port()}", "--tokenizer", folder): "does not answer",
        ("http://127.0.0.1:1",): "tokenizer is missing",
        (folder, "--goodput", "ttft"): "goodput must be metrics and milliseconds",
        (folder, "--goodput", "speed:3"): "unknown metric 'speed'",
        (folder, "--new-tokens", 1): "--new-tokens must be at least 2",
        (folder, "--prompt-tokens", 10**6): "more than the model's",
    }
    for arguments, message in refusals.items():
        outcome = bench("serve", *arguments)
        assert (outcome.code, message in outcome.err) == (2, True), outcome.err
    assert not (folder / "processes").exists()


def test_without_vllm_or_its_client_the_error_has_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    request = ServeRequest(["model"])
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    with pytest.raises(MissingPackageError, match="vllm is not installed; pip install vllm"):
        list(run(request))
    (tmp_path / "vllm").mkdir()
    (tmp_path / "vllm" / "__init__.py").touch()
    with pytest.raises(MissingPackageError, match=r"no benchmarks/serve\.py; pip install --upgrade vllm"):
        list(run(request))


class Hostile(BaseHTTPRequestHandler):
    """Redirects, and answers without end, at once or slowly."""

    def do_GET(self) -> None:
        if self.path == "/redirect":
            self.send_response(302)
            self.send_header("Location", "/models")
            self.end_headers()
            return
        self.send_response(200)
        self.end_headers()
        with suppress(OSError):
            while True:
                self.wfile.write(b" " * (1 << 20) if self.path == "/large" else b" ")
                time.sleep(0 if self.path == "/large" else 0.05)

    def log_message(self, *_: object) -> None:
        pass


def test_answers_of_a_hostile_server_have_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "ANSWER_SECONDS", 1)
    monkeypatch.setattr(servers, "LIMIT", 10**7)
    with ThreadingHTTPServer(("127.0.0.1", 0), Hostile) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        for path, message in {
            "/redirect": "answers HTTP 302",
            "/large": "its answer has more than 10.0 MB",
            "/slow": "its answer takes more than 1 s",
        }.items():
            with pytest.raises(ServerError, match=message):
                servers.fetch(f"http://127.0.0.1:{server.server_port}{path}")
        server.shutdown()
