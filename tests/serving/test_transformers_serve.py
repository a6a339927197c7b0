"""The commands of docs/serve, unchanged, on a tiny checkpoint; the server serves the built-in model."""

from __future__ import annotations

import json
import shlex
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import URLError

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from grasp.checkpoint.saving import save_checkpoint
from grasp.loading import load_model
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from tests.command_line import environment
from tests.documents import blocks, commands, read, run_python, sections
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

SERVER = read("docs/serve/transformers-serve.md")
PAGES = {name: read(f"docs/serve/{name}.md") for name in ("transformers", "compile-and-export", "training")}
SECTIONS = {
    "transformers": PAGES["transformers"].split("\n## ")[0],
    **{heading: text for page in PAGES.values() for heading, text in sections(page).items()},
}
QUESTION = [{"role": "user", "content": "Name a colour."}]
TOKENS = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``small``: one low-rank layer and a byte tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("tiny"), byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer), num_hidden_layers=1)
    for rank, target in enumerate(layer_targets(model, 0)[0], start=3):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    save_checkpoint(model, folder / "small", tokenizer=tokenizer)
    return folder


@pytest.fixture(scope="module")
def builtin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint ``small``: the built-in model with one layer compressed by plain SVD."""
    folder = tmp_path_factory.mktemp("builtin")
    model, tokenizer = load_model("builtin", dtype="float32")
    for rank, target in enumerate(layer_targets(model, 14)[0], start=80):
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(rank)))
    save_checkpoint(model, folder / "small", tokenizer=tokenizer)
    return folder


def test_every_command_shown_is_run() -> None:
    shown = [line for page in (*PAGES.values(), SERVER) for line in commands(page)]
    assert [shlex.split(line)[0] for line in shown] == ["torchrun", "transformers", "curl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "section", ["transformers", "torch.compile", "torch.export and AOTInductor", "Trainer", "peft"]
)
def test_the_python_of_a_section_runs(tiny: Path, section: str) -> None:
    printed = [run_python(code, tiny) for code in blocks(SECTIONS[section], "python")]
    assert printed[-1].strip()
    if section.startswith("torch.export"):
        model, tokens = AutoModelForCausalLM.from_pretrained(tiny / "small"), torch.arange(3, 24).reshape(3, 7)
        program = torch.export.load(tiny / "small.pt2")
        ops = [str(node.target) for node in program.graph.nodes if "grasp" in str(node.target)]
        assert ops == 7 * ["grasp.lowrank_linear.default"]
        compiled = torch._inductor.aoti_load_package(str(tiny / "small-compiled.pt2"))
        with torch.no_grad():
            torch.testing.assert_close(compiled(tokens), model(tokens).logits, rtol=1e-4, atol=1e-4)
    for made in {"Trainer": ["trained"], "peft": ["merged"]}.get(section, []):
        model = AutoModelForCausalLM.from_pretrained(tiny / made)
        assert any(isinstance(module, LowRankLinear) for module in model.modules())


@pytest.mark.slow
def test_the_split_model_runs_in_two_processes(tiny: Path) -> None:
    (code,) = blocks(SECTIONS["Several GPUs: tensor parallelism"], "python")
    (tiny / "split.py").write_text(code)
    (line,) = commands(SECTIONS["Several GPUs: tensor parallelism"])
    program, *arguments = shlex.split(line)
    assert program == "torchrun"
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *arguments],
        cwd=tiny,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout


@contextmanager
def served(folder: Path, *options: str) -> Iterator[int]:
    """Start the server of the document on a free port, and yield the port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program, *arguments = shlex.split(commands(SERVER)[0].replace("8000", str(port)))
    command = [str(Path(sys.executable).with_name(program)), *arguments, *options]
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(command, cwd=folder, env=environment(), stdout=log, stderr=log)
    try:
        _wait(f"http://localhost:{port}/health", server, folder / "log")
        yield port
    finally:
        server.terminate()
        try:
            server.wait(60)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def _wait(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until a server answers; a failure has the output of the server."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and server.poll() is None:
        try:
            with urllib.request.urlopen(url, timeout=60):
                return
        except (URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(f"the server did not start\n{log.read_text()}")


def ask(port: int, **options: Any) -> list[str]:
    """The lines of the greedily decoded answer to ``QUESTION``."""
    body = {"model": "small", "messages": QUESTION, "max_tokens": TOKENS, "temperature": 0, **options}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return [line for line in answer.read().decode().splitlines() if line]


def streamed(lines: list[str]) -> list[str]:
    """The texts of server-sent events."""
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line != "data: [DONE]"]
    return [event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"]]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [[], ["--continuous-batching", "--cb-num-blocks", "64", "--cb-max-batch-tokens", "128"]],
    ids=["one by one", "continuous batching"],
)
def test_transformers_serve_answers_with_the_tokens_of_generate(builtin: Path, options: list[str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(builtin / "small")
    tokenizer = AutoTokenizer.from_pretrained(builtin / "small")
    prompt = tokenizer.apply_chat_template(QUESTION, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
    expected = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
    with served(builtin, *options) as port:
        (answer,) = ask(port)
        assert json.loads(answer)["choices"][0]["message"]["content"] == expected
        pieces = streamed(ask(port, stream=True))
        assert "".join(pieces) == expected
        assert sum(map(bool, pieces)) > 3
        if not options:
            code = blocks(SERVER, "python")[0]
            assert run_python(code.replace("8000", str(port)), builtin).strip()
            curl = commands(SERVER)[1].replace("8000", str(port))
            if shutil.which("curl"):
                shown = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=300, check=True)
                assert json.loads(shown.stdout)["choices"][0]["message"]["content"]
