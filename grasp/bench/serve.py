"""Time vLLM's server on several models in turn, with vLLM's own benchmark client.

A server is timed only if it gives the log-probabilities of transformers, see ``Checkpoint``.
"""

from __future__ import annotations

import math
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

import torch
from torch import Tensor
from transformers import PreTrainedModel

from grasp.bench.conditions import Conditions, conditions, measure_card
from grasp.bench.percentiles import PERCENTS, Percentiles
from grasp.bench.records import NotMeasured
from grasp.bench.serve_records import ServeResult
from grasp.bench.servers import COMMAND, HOST, Process, Server, connect, finish, free_port, start
from grasp.bench.timing import Sample, turns
from grasp.builtin import BUILTIN, packaged_folders
from grasp.errors import MissingPackageError, ServerError
from grasp.evaluation.generation import random_prompt
from grasp.files import expanded
from grasp.formatting import one_line
from grasp.loading import DTYPES, find_device, load_config, load_quietly
from grasp.model.size import Size, model_size
from grasp.model.targets import vocabulary_size
from grasp.progress import Progress, no_progress, one_step
from grasp.reading import read_json

Numbers = Mapping[str, float]  # of the client, by its names

LIMITS = ("ttft", "tpot", "e2el")  # metrics of vLLM's client that may have a limit
METRICS = ("ttft", "tpot", "itl", "e2el")
SCORED_TOKENS = 256
FLOOR = 1e-3  # nats; mean error of log-probabilities that rounding in fp32 explains
MEMORY = 0.8  # fraction of the memory that all servers take together
# What `vllm bench serve` does; the command itself ends with an error if the distribution is not named vllm.
CLIENT = """
import argparse
from vllm.benchmarks.serve import add_cli_args, main
parser = argparse.ArgumentParser()
add_cli_args(parser)
main(parser.parse_args())
"""


@dataclass(frozen=True)
class ServeRequest:
    """Settings of one run.

    Raises:
        ValueError: if ``new_tokens``, ``time_limit`` or a limit is out of range, a limit is of an unknown metric, or
            no model is served and ``tokenizer`` is missing.
    """

    # names as for ``load_model``, which are served, and addresses of servers that run already. The others are compared
    # with the first one.
    models: Sequence[str]
    concurrencies: Sequence[int] = (1, 4, 16)  # numbers of requests at a time
    requests: int = 5  # number of requests in a round, for each of those at a time
    prompt_tokens: int = 128  # tokens of each prompt
    new_tokens: int = 64  # tokens of each answer, at least 2
    rounds: int = 3  # turns of every server
    # metric in ``LIMITS`` → ms; requests within all of them count as good
    limits: Mapping[str, float] = field(default_factory=dict)
    dtype: str = "auto"  # as for ``load_model``; ``auto`` is that of the first model that is served
    tokenizer: str | None = None  # of servers that run already; ``None`` is that of the first model served here
    server_options: Sequence[str] = ()  # further arguments of vLLM's servers
    time_limit: float = 900  # seconds that each start of a server and each run of the client may take

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.limits) - set(LIMITS)):
            raise ValueError(f"unknown metric {unknown[0]!r} with a limit; expected some of {', '.join(LIMITS)}")
        if self.new_tokens < 2:
            raise ValueError(f"new_tokens must be at least 2, got {self.new_tokens}")
        if self.tokenizer is None and all(map(_is_url, self.models)):
            raise ValueError("tokenizer is missing; give the folder or hub name of the tokenizer of the servers")
        if not self.time_limit > 0:
            raise ValueError(f"time_limit must be above 0, got {self.time_limit:g}")
        if bad := {metric: limit for metric, limit in self.limits.items() if not limit >= 0}:
            raise ValueError(f"limits must be at least 0 ms, got {bad}")


@dataclass(frozen=True)
class Checkpoint:
    """A folder that vLLM can serve, and the facts that need its weights."""

    name: str  # of the model
    folder: Path  # with its weights
    size: Size  # of the model
    dtype: str  # of the server
    tokens: Sequence[int]  # random ones, whose log-probabilities by transformers a server must have too
    exact: Tensor  # of each token but the first, with the weights in the server's dtype and the arithmetic in fp32
    rounding: float  # mean absolute error of transformers in the server's dtype, nats

    def error_of(self, server: Server) -> float:
        """Mean absolute error of a server, nats."""
        values = torch.tensor(server.log_probabilities(self.tokens))[: len(self.exact)]
        return (values - self.exact).abs().mean().item()

    @property
    def allowed(self) -> float:
        """The largest error of a server that is right."""
        return max(FLOOR, 2 * self.rounding)


def run(request: ServeRequest, *, progress: Progress = no_progress) -> Iterator[list[ServeResult | NotMeasured]]:
    """Start all servers, check them, and time them at one concurrency after the other. All processes end with it.

    Raises:
        MissingPackageError: if vLLM or its client is not installed.
        ServerError: if a server does not start, stops answering, or gives no valid answer, or the client fails.
        GraspError, ValueError: from ``load_model``.
    """
    require_client()
    with tempfile.TemporaryDirectory(prefix="grasp-serve-") as folder, ExitStack() as stack:
        scratch = Path(folder)
        candidates = _candidates(request, scratch, progress)
        checkpoints = {item.name: item for item in candidates if isinstance(item, Checkpoint)}
        now = _conditions(next(iter(checkpoints.values())).dtype) if checkpoints else None
        servers = {
            item.name: _started(item, request, MEMORY / len(checkpoints), scratch, stack, progress)
            if isinstance(item, Checkpoint)
            else item
            for item in candidates
        }
        errors = {name: checkpoint.error_of(servers[name]) for name, checkpoint in checkpoints.items()}
        refused = {name: error for name, error in errors.items() if not error <= checkpoints[name].allowed}
        model = candidates[0].name if _is_url(request.models[0]) else request.models[0]
        if refused:
            yield [_refusal(checkpoints[name], error, model) for name, error in refused.items()]
        right = {name: server for name, server in servers.items() if name not in refused}
        if right:
            bench = _Bench(request, scratch, right, checkpoints, errors, candidates[0].name, model, now)
            for concurrency in request.concurrencies:
                yield bench.measure(concurrency, progress)


def require_client() -> None:
    """Check that vLLM's benchmark client is installed.

    Raises:
        MissingPackageError: with the command that installs it.
    """
    folders = packaged_folders("vllm")
    if not any((folder / "benchmarks" / "serve.py").is_file() for folder in folders):
        problem = "has no benchmarks/serve.py" if folders else "is not installed"
        remedy = "pip install --upgrade vllm" if folders else "pip install vllm"
        raise MissingPackageError(f"vLLM with its benchmark client is needed, but vllm {problem}; {remedy}")


def _candidates(request: ServeRequest, scratch: Path, progress: Progress) -> list[Server | Checkpoint]:
    """The servers that run already, and what must be served, in the order of the request."""
    running = {model: connect(model.rstrip("/").removesuffix("/v1")) for model in request.models if _is_url(model)}
    names = [running[model].name if model in running else _name(model) for model in request.models]
    if len(set(names)) < len(names):
        raise ValueError(f"the models need different names to be told apart; got {', '.join(names)}")
    for server in running.values():
        server.log_probabilities(range(100, 132))  # raises if it computes nothing
    dtype = request.dtype
    if served := [model for model in request.models if model not in running]:
        dtype = str(load_config(served[0], dtype=dtype)[1]).removeprefix("torch.")
    return [running.get(model) or _checkpoint(model, dtype, request, scratch, progress) for model in request.models]


def _name(model: str) -> str:
    return expanded(model).resolve().name


def _is_url(model: str) -> bool:
    return model.startswith(("http://", "https://"))


def _checkpoint(model: str, dtype: str, request: ServeRequest, scratch: Path, progress: Progress) -> Checkpoint:
    """Load a model for its log-probabilities; save it where vLLM can read it, unless it is a folder."""
    loaded, tokenizer = load_quietly(model, dtype=dtype, device="cpu", progress=progress)
    random_prompt(loaded, request.prompt_tokens, request.new_tokens, 1)  # raises if impossible
    folder = expanded(model)
    if model == BUILTIN or not folder.is_dir():
        folder = scratch / _name(model)
        for part in (loaded, tokenizer):
            part.save_pretrained(folder)
    vocabulary = min(len(tokenizer), vocabulary_size(loaded))
    length = min(SCORED_TOKENS, request.prompt_tokens + request.new_tokens - 1)
    tokens = torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))
    size = model_size(loaded)
    rounded = log_probabilities(loaded, tokens)
    exact = log_probabilities(loaded.float(), tokens)
    rounding = (rounded - exact).abs().mean().item()
    return Checkpoint(_name(model), folder, size, dtype, tokens.tolist(), exact, rounding)


@torch.inference_mode()
def log_probabilities(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The log-probability of each token (L,) but the first, (L - 1,) in fp32."""
    logits = model(input_ids=tokens[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(1, tokens[1:, None]).squeeze(1)


def _conditions(dtype: str) -> Conditions:
    """The present conditions of this machine. vLLM chooses its threads."""
    device = find_device(None)
    return replace(conditions(measure_card(device, DTYPES[dtype]), device), threads=None)


def _started(
    checkpoint: Checkpoint, request: ServeRequest, memory: float, scratch: Path, stack: ExitStack, progress: Progress
) -> Server:
    """Start vLLM on a folder until ``stack`` ends. It keeps no prefixes, because warm-ups repeat the first prompt."""
    name, port = checkpoint.name, free_port()
    arguments = ["--model", str(checkpoint.folder), "--served-model-name", name, "--dtype", checkpoint.dtype]
    arguments += ["--host", HOST, "--port", str(port), "--no-enable-prefix-caching"]
    arguments += ["--gpu-memory-utilization", f"{memory:.3f}", *request.server_options]
    with one_step(progress, f"starting {name}"):
        process = stack.enter_context(Process([*COMMAND, *arguments], scratch / f"{name}.log", offline=True))
        return start(process, name, f"http://{HOST}:{port}", request.time_limit)


def _refusal(checkpoint: Checkpoint, error: float, model: str) -> NotMeasured:
    reason = (
        f"log-probabilities are {error:.2g} nats from those of transformers in fp32; expected at most "
        f"{checkpoint.allowed:.2g}, twice the error of transformers in {checkpoint.dtype}"
    )
    return NotMeasured("serve", checkpoint.name, reason, wrong=True, model=model)


@dataclass(frozen=True)
class _Bench:
    """The servers that are right, and the facts that all loads share."""

    request: ServeRequest
    scratch: Path
    servers: Mapping[str, Server]
    checkpoints: Mapping[str, Checkpoint]
    errors: Mapping[str, float]  # of log-probabilities
    first: str  # server that the others are compared with
    model: str  # the same, as it was asked for, unless by an address
    now: Conditions | None  # of the servers that were started here

    def measure(self, concurrency: int, progress: Progress) -> list[ServeResult | NotMeasured]:
        """Time all servers at one concurrency, in turns."""
        rounds: dict[str, list[Numbers]] = {name: [] for name in self.servers}
        step, total = f"serving, {concurrency} at once", self.request.rounds * len(self.servers)
        for done, (number, name) in enumerate(turns(list(self.servers), self.request.rounds)):
            progress(step, done, total)
            rounds[name].append(self._round(self.servers[name], concurrency, number))
        progress(step, total, total)
        return [self._result(name, concurrency, own, rounds.get(self.first)) for name, own in rounds.items()]

    def _round(self, server: Server, concurrency: int, number: int) -> Numbers:
        """Run the client once; all numbers that it reports."""
        request, requests = self.request, concurrency * self.request.requests
        result = self.scratch / "client.json"
        result.unlink(missing_ok=True)  # of the round before
        options = {
            **{"base-url": server.url, "model": server.model, "tokenizer": self._tokenizer(server.name)},
            **{"dataset-name": "random", "seed": 1000 * concurrency + number, "num-prompts": requests},
            **{"random-input-len": request.prompt_tokens, "random-output-len": request.new_tokens},
            **{"max-concurrency": concurrency, "num-warmups": concurrency, "temperature": 0},
            **{"percentile-metrics": ",".join(METRICS), "metric-percentiles": ",".join(map(str, PERCENTS))},
            **{"result-dir": self.scratch, "result-filename": result.name},
        }
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        if request.limits:
            arguments += ["--goodput", *(f"{metric}:{limit:g}" for metric, limit in request.limits.items())]
        command = [sys.executable, "-c", CLIENT, *arguments, "--save-result", "--save-detailed", "--disable-tqdm"]
        with Process(command, self.scratch / "client.log", offline=server.process is not None) as client:
            finish(client, server, request.time_limit)
        answer = read_json(result, "the result of vLLM's client", ServerError, finite=False)
        got = [answer.get(name) for name in ("completed", "total_output_tokens")]
        if got != (expected := [requests, requests * request.new_tokens]):
            reason = next(filter(None, answer.get("errors", ())), "the client names no error")
            raise ServerError(
                f"the server of {server.name} completed {got[0]} requests with {got[1]} tokens; expected "
                f"{expected[0]} with {expected[1]}; {one_line(reason)}"
            )
        numbers = {name: float(value) for name, value in answer.items() if type(value) in (int, float)}
        if bad := sorted(name for name in _needed(request) if not math.isfinite(numbers.get(name, math.nan))):
            raise ServerError(f"vLLM's client gave no finite {', '.join(bad)}; expected a number: upgrade vllm")
        return {name: value for name, value in numbers.items() if math.isfinite(value)}

    def _tokenizer(self, name: str) -> Path | str:
        """The folder or hub name that the client loads: never what a server says."""
        if (own := self.checkpoints.get(name)) is not None:
            return own.folder
        return self.request.tokenizer or next(iter(self.checkpoints.values())).folder

    def _result(
        self, name: str, concurrency: int, rounds: Sequence[Numbers], first: Sequence[Numbers] | None
    ) -> ServeResult:
        request, known = self.request, self.checkpoints.get(name)
        durations = Sample(tuple(numbers["duration"] for numbers in rounds))
        return ServeResult(
            model=self.model,
            provider=name,
            vllm=self.servers[name].version,
            dtype=None if known is None else known.dtype,
            parameters=None if known is None else known.size.parameters,
            weight_bytes=None if known is None else known.size.bytes,
            concurrency=concurrency,
            requests=concurrency * request.requests,
            prompt_tokens=request.prompt_tokens,
            new_tokens=request.new_tokens,
            rounds=request.rounds,
            limits=request.limits,
            first_token_ms=percentiles(rounds, "ttft"),
            output_token_ms=percentiles(rounds, "tpot"),
            inter_token_ms=percentiles(rounds, "itl"),
            end_to_end_ms=percentiles(rounds, "e2el"),
            requests_per_s=_median(rounds, "request_throughput"),
            output_tokens_per_s=_median(rounds, "output_throughput"),
            good_requests_per_s=_median(rounds, "request_goodput") if request.limits else None,
            spread=durations.spread,
            throughput_speedup=speedup(rounds, first, "duration"),
            first_token_speedup=speedup(rounds, first, "p50_ttft_ms"),
            output_token_speedup=speedup(rounds, first, "p50_tpot_ms"),
            log_probability_error=self.errors.get(name),
            rounding_error=None if known is None else known.rounding,
            client=tuple(rounds),
            conditions=None if known is None else self.now,
        )


def _needed(request: ServeRequest) -> list[str]:
    """The client's numbers that a result is made of."""
    rates = ["duration", "request_throughput", "output_throughput", *["request_goodput"] * bool(request.limits)]
    return rates + [f"p{percent}_{metric}_ms" for metric in METRICS for percent in PERCENTS]


def _median(rounds: Sequence[Numbers], name: str) -> float:
    return median(numbers[name] for numbers in rounds)


def percentiles(rounds: Sequence[Numbers], metric: str) -> Percentiles:
    """The percentiles of one metric: medians over the rounds."""
    p50, p90, p95, p99 = (_median(rounds, f"p{percent}_{metric}_ms") for percent in PERCENTS)
    return Percentiles(p50, p95, p99, p90)


def speedup(rounds: Sequence[Numbers], first: Sequence[Numbers] | None, name: str) -> float | None:
    """Median over the rounds of the first server's time over this one's; ``None`` if the first was not timed."""
    if first is None:
        return None
    own, other = (Sample(tuple(numbers[name] for numbers in side)) for side in (rounds, first))
    return own.speedup_over(other)
