"""The records of ``grasp bench serve``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar

from grasp.bench.conditions import Conditions
from grasp.bench.percentiles import Percentiles
from grasp.bench.schema import Record
from grasp.formatting import Column, count, model_name, share, size


@dataclass(frozen=True)
class ServeResult(Record):
    """One server under one load in ``grasp bench serve``, as vLLM's benchmark client measured it.

    Each number is the median over the rounds of the client's number. A speed-up is the median of the ratios of each
    round; above 1 this server is faster than the first one.

    Attributes:
        model: the first model, as it was given.
        provider: name of this server's model.
        vllm: version of vLLM that serves; ``None`` if the server does not tell.
        dtype: of weights and activations; ``None`` for a server that ran already.
        parameters: number of parameters; ``None`` for a server that ran already.
        weight_bytes: bytes of these parameters; ``None`` likewise.
        concurrency: requests at a time.
        requests: number of requests of a round.
        prompt_tokens: tokens of each prompt, which is random.
        new_tokens: tokens of each answer.
        rounds: number of turns of every server.
        limits: metric (``ttft``, ``tpot``, ``e2el``) → its largest time in ms of a request that counts as good.
        first_token_ms: from a request to its first token (TTFT).
        output_token_ms: mean time of each further token of a request (TPOT).
        inter_token_ms: from one token to the next (ITL).
        end_to_end_ms: from a request to its last token (E2EL).
        requests_per_s: answered requests per second.
        output_tokens_per_s: tokens of answers per second, all requests together.
        good_requests_per_s: requests within all ``limits`` per second (goodput); ``None`` without limits.
        spread: distance between the quartiles of the rounds' durations over their median.
        throughput_speedup: of the duration of a round. ``None``, as the next two, if the first server was not timed.
        first_token_speedup: of the median TTFT.
        output_token_speedup: of the median TPOT.
        log_probability_error: mean absolute difference of the server's log-probabilities from those of transformers
            in fp32, nats. ``None`` for a server that ran already.
        rounding_error: the same of transformers in ``dtype``.
        client: all numbers of the client, of each round.
        conditions: when and where; ``None`` for a server that ran already. The threads are vLLM's choice.

    Example:
        >>> [column.heading for column in ServeResult.columns[:3]]
        ['server', 'tokens/s', 'tokens/s ×']
    """

    model: str
    provider: str
    vllm: str | None
    dtype: str | None
    parameters: int | None
    weight_bytes: int | None
    concurrency: int
    requests: int
    prompt_tokens: int
    new_tokens: int
    rounds: int
    limits: Mapping[str, float]
    first_token_ms: Percentiles
    output_token_ms: Percentiles
    inter_token_ms: Percentiles
    end_to_end_ms: Percentiles
    requests_per_s: float
    output_tokens_per_s: float
    good_requests_per_s: float | None
    spread: float
    throughput_speedup: float | None
    first_token_speedup: float | None
    output_token_speedup: float | None
    log_probability_error: float | None
    rounding_error: float | None
    client: tuple[Mapping[str, float], ...]
    conditions: Conditions | None

    kind: ClassVar[str] = "serve"
    title: ClassVar[str] = "Servers"
    case: ClassVar[tuple[Column, ...]] = (
        Column("model", "model", model_name),
        Column("concurrency", "concurrency"),
        Column("requests", "requests"),
        Column("prompt tokens", "prompt_tokens"),
        Column("new tokens", "new_tokens"),
        Column("rounds", "rounds"),
        Column("good within", lambda result: ", ".join(f"{m} {ms:g} ms" for m, ms in result.limits.items()) or None),
    )
    columns: ClassVar[tuple[Column, ...]] = (
        Column("server", "provider"),
        Column("tokens/s", "output_tokens_per_s", "{:.1f}".format),
        Column("tokens/s ×", "throughput_speedup", "{:.2f}".format),
        Column("first token ms", "first_token_ms"),
        Column("first token ×", "first_token_speedup", "{:.2f}".format),
        Column("ms per token", "output_token_ms"),
        Column("per token ×", "output_token_speedup", "{:.2f}".format),
        Column("requests/s", "requests_per_s", "{:.3g}".format),
        Column("good/s", "good_requests_per_s", "{:.3g}".format),
        Column("spread", "spread", share),
        Column("between tokens ms", "inter_token_ms"),
        Column("end to end ms", "end_to_end_ms"),
        Column("dtype", "dtype"),
        Column("parameters", "parameters", count),
        Column("weights", "weight_bytes", size),
        Column("log-probabilities off", "log_probability_error", "{:.0e}".format),
    )
    legend: ClassVar[str] = (
        "Milliseconds are p50, p95 and p99 of requests. Every number is the median over the rounds of what vLLM's "
        "client reports. × is a speed-up over the first server. Spread is the distance between the quartiles of the "
        "rounds' durations over the median. Log-probabilities off is the mean difference in nats from transformers in "
        "fp32."
    )
    figures: ClassVar[tuple[str, ...]] = ("grasp.reporting.pictures:serving_loads",)

    def notes(self) -> Iterator[str]:
        """Conditions, and the version of vLLM."""
        yield from super().notes()
        if self.vllm is not None:
            yield f"Served by vLLM {self.vllm}."
