"""The commands of docs/serve/sglang.md for a CPU, as they stand there."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from grasp.bench.servers import free_port
from tests.command_line import ROOT
from tests.documents import blocks, read
from tests.sglang.processes import MISSING, TIMEOUT, sglang_environment
from tests.vllm.engines import greedy, load

pytest.importorskip("sglang", reason=MISSING)
pytestmark = pytest.mark.slow

LINES = [line for code in blocks(read("docs/serve/sglang.md"), "sh") for line in code.splitlines()]


def command(*parts: str) -> str:
    """The one line of the document that has all parts."""
    (line,) = [line for line in LINES if all(part in line for part in parts)]
    return line


def healthy(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://localhost:{port}/health", timeout=60) as answer:
            return answer.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def test_the_server_of_the_page_gives_the_text_of_transformers(tmp_path: Path) -> None:
    port = free_port()
    variables = sglang_environment()
    variables["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{variables['PATH']}"
    here = {"cwd": tmp_path, "env": variables, "text": True}
    subprocess.run(command("grasp compress"), shell=True, check=True, timeout=TIMEOUT, **here)
    log = (tmp_path / "server.log").open("w")
    checkout = os.pathsep.join([f"PYTHONPATH={ROOT}/tests/sglang/without_kernels", variables["PYTHONPATH"]])
    line = command("launch_server", "--device cpu").replace("30000", str(port))
    line = line.replace("PYTHONPATH=tests/sglang/without_kernels", checkout)
    server = subprocess.Popen(f"exec env {line}", shell=True, stdout=log, stderr=log, start_new_session=True, **here)
    try:
        deadline = time.monotonic() + TIMEOUT
        while not healthy(port):
            assert server.poll() is None, (tmp_path / "server.log").read_text()[-6000:]
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(1)
        curl = command("curl").replace("30000", str(port))
        answer = json.loads(subprocess.check_output(curl, shell=True, timeout=TIMEOUT, **here))
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "small")
    model = load(tmp_path / "small", torch.float32)
    (tokens,) = greedy(model, [tokenizer("The first thing")["input_ids"]], 16)
    assert answer["choices"][0]["text"] == tokenizer.decode(tokens, skip_special_tokens=True)
