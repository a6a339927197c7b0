"""The commands of docs/serve/vllm.md, as they stand there, and a server under load."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from grasp.bench.servers import free_port
from tests.command_line import ROOT
from tests.vllm.engines import TIMEOUT, greedy, load, vllm_environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

DOCUMENT = (ROOT / "docs" / "serve" / "vllm.md").read_text(encoding="utf-8")
FENCES = re.findall(r"^```(\w+)\n(.*?)^```$", DOCUMENT, re.MULTILINE | re.DOTALL)
LINES = [line for language, code in FENCES if language == "sh" for line in code.splitlines()]
(PYTHON,) = [code for language, code in FENCES if language == "python"]

TEXTS = [
    f"{start} {end}"
    for start in ("The first thing", "In the year 1900", "A cat is", "To cook rice,")
    for end in ("that", "there was", "and then", "you should")
]
NEW_TOKENS = 16


def command(beginning: str) -> str:
    """The one line of the document that has a command."""
    (line,) = [line for line in LINES if beginning in line]
    return line


def environment() -> dict[str, str]:
    """The commands find `grasp` and `python` where a user's activated environment has them."""
    variables = vllm_environment()
    return {**variables, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"}


def shell(line: str, folder: Path) -> str:
    done = subprocess.run(
        line, shell=True, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the document's commands run; ``small`` is there."""
    path = tmp_path_factory.mktemp("commands")
    shell(command("grasp compress"), path)
    return path


@pytest.fixture(scope="module")
def port(folder: Path) -> Iterator[int]:
    """Of the document's server, in fp32 so that tokens can be compared."""
    port = free_port()
    line = command("--model small --port").replace("8000", str(port)) + " --dtype float32 --max-model-len 512"
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec env {line}"],
            cwd=folder,
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + TIMEOUT
        while not healthy(port):
            assert server.poll() is None, (folder / "server.log").read_text()[-6000:]
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(1)
        yield port
    finally:
        server.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=5) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, str]:
    """transformers' continuation of each text, in fp32."""
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder / "small")
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    continuations = greedy(load(folder / "small", torch.float32), prompts, NEW_TOKENS)
    return {
        text: tokenizer.decode(tokens, skip_special_tokens=True)
        for text, tokens in zip(TEXTS, continuations, strict=True)
    }


def complete(port: int, text: str) -> str:
    asked = {"model": "small", "prompt": text, "max_tokens": NEW_TOKENS, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/completions",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=TIMEOUT) as answer:
        return json.load(answer)["choices"][0]["text"]


def test_the_server_answers_curl(port: int, folder: Path) -> None:
    line = command("curl").replace("8000", str(port))
    assert shlex.split(line)[0] == "curl"
    assert json.loads(shell(line, folder))["choices"][0]["text"].strip()


def test_sixteen_clients_at_once_get_the_texts_of_transformers(port: int, expected: dict[str, str]) -> None:
    assert len(TEXTS) == 16
    for _ in range(3):  # as prefixes get cached
        with ThreadPoolExecutor(len(TEXTS)) as clients:
            answers = list(clients.map(lambda text: complete(port, text), TEXTS))
        assert dict(zip(TEXTS, answers, strict=True)) == expected


def test_the_python_block_gives_the_text_of_transformers(folder: Path, port: int) -> None:
    (folder / "script.py").write_text(PYTHON)
    printed = shell("python script.py", folder)
    (text,) = re.findall(r'engine.generate\("(.*?)"', PYTHON)
    assert complete(port, text).split("\n")[0] in printed
