"""The data of the figures of benchmark results: results grouped into comparisons. Pure functions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

from grasp.bench.records import PLAIN_SVD
from grasp.bench.schema import grouped
from grasp.errors import ResultsError
from grasp.formatting import model_name
from grasp.method.storage import parse_storages
from grasp_kernels import roofline
from grasp_kernels.dispatch import BACKENDS
from grasp_kernels.shapes import parse_forms, parse_shape

if TYPE_CHECKING:
    from grasp.bench.percentiles import Percentiles
    from grasp.bench.records import ModelResult, OpResult
    from grasp.bench.serve_records import ServeResult

_PROVIDERS = {"removed": "layers removed", "compiled": "torch.compile"}  # those with another label than their name
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Comparison(NamedTuple):
    """Results that may be compared in one figure, described by what they have in common."""

    title: str
    conditions: str


class Quality(NamedTuple):
    """Perplexity at a size; several seeds have a mean and a range."""

    label: str
    x: float
    perplexity: float
    low: float
    high: float


class Stored(NamedTuple):
    """A model in one way of storing its weights, beside its dense model in bfloat16."""

    label: str
    of_dense: float  # bytes over those of the dense model
    excess: float  # nats per token over it


class Trade(NamedTuple):
    """A model's speed, and what it costs; ``None`` for a perplexity that was not measured."""

    label: str
    tokens_per_s: float
    weight_bytes: int
    perplexity: float | None


class Latency(NamedTuple):
    """Times of one provider at one batch size, in ms."""

    label: str
    batch_size: int
    first_token: Percentiles
    inter_token: Percentiles


class Load(NamedTuple):
    """One server at one concurrency: median ms per token of a request, and tokens/s of all requests."""

    label: str
    concurrency: int
    output_token_ms: float
    tokens_per_s: float


class Speed(NamedTuple):
    """One provider at one shape: FLOPs per byte that must be moved, and FLOP/s."""

    label: str
    intensity: float
    flops: float


class Roof(NamedTuple):
    """Measured limits of a device in FLOP/s and bytes/s, and the speeds below them."""

    flops: float
    bandwidth: float
    speeds: tuple[Speed, ...]


def pareto_front(places: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
    """The places that no other is below in x and y at once, by ascending x."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(places):
        if not front or y < front[-1][1]:
            front.append((x, y))
    return front


def by_size(results: Iterable[ModelResult]) -> dict[Comparison, list[Quality]]:
    """Perplexity against parameters for each model and text. Providers with the same weights are one point."""
    data: dict[Comparison, list[Quality]] = defaultdict(list)
    for result in results:
        if result.perplexity is not None and result.provider != "unfused":  # which has the weights of "compressed"
            comparison = Comparison(
                f"{model_name(result.model)}, {_text(result)}", f"{result.dtype}; {result.conditions}"
            )
            point = Quality(_weights(result), result.parameters, *[result.perplexity] * 3)
            if point not in data[comparison]:
                data[comparison].append(point)
    return dict(data)


def trades(results: Iterable[ModelResult]) -> dict[Comparison, list[Trade]]:
    """Speed, bytes and perplexity for each model, prompt and batch size. The last result of a provider counts."""
    data: dict[Comparison, dict[str, Trade]] = defaultdict(dict)
    for result in results:
        text = "" if result.perplexity_text is None else f"; perplexity on {_text(result)}"
        comparison = Comparison(
            f"{model_name(result.model)}, batch {result.batch_size}",
            f"Prompt of {_prompt(result)}{text}; {_setting(result)}",
        )
        label = _provider(result)
        data[comparison][label] = Trade(label, result.decode_tokens_per_s, result.weight_bytes, result.perplexity)
    return {comparison: list(points.values()) for comparison, points in data.items()}


def latencies(results: Iterable[ModelResult]) -> dict[Comparison, list[Latency]]:
    """Times of the providers of each model. The last result of a provider replaces earlier ones."""
    data: dict[Comparison, dict[tuple[str, int], Latency]] = defaultdict(dict)
    for result in results:
        comparison = Comparison(
            f"{model_name(result.model)}, prompt of {_prompt(result)}",
            _setting(result),
        )
        bar = Latency(_provider(result), result.batch_size, result.first_token_ms, result.inter_token_ms)
        data[comparison][bar.label, bar.batch_size] = bar
    return {comparison: list(bars.values()) for comparison, bars in data.items()}


def serving_loads(results: Iterable[ServeResult]) -> dict[Comparison, list[Load]]:
    """The loads of the servers by concurrency, for each first model and length of requests; later results replace."""
    data: dict[Comparison, dict[tuple[str, int], Load]] = defaultdict(dict)
    for result in results:
        comparison = Comparison(
            f"{model_name(result.model)}, {result.prompt_tokens} + {result.new_tokens} tokens",
            str(result.conditions or "servers that ran already"),
        )
        load = Load(result.provider, result.concurrency, result.output_token_ms.p50, result.output_tokens_per_s)
        data[comparison][load.label, load.concurrency] = load
    return {comparison: sorted(loads.values(), key=lambda load: load.concurrency) for comparison, loads in data.items()}


def roofs(results: Iterable[OpResult]) -> dict[Comparison, Roof]:
    """Speeds below the limits of the device that the same runs measured, for each op, dtype and device.

    Raises:
        ResultsError: if a result has an unknown op or dtype, or no time.
    """
    data: dict[Comparison, Roof] = {}
    for same in grouped(results, lambda line: (line.op, line.dtype, line.conditions.processor)).values():
        speeds = tuple(speed for line in same if (speed := _speed(line)) is not None)
        if speeds:
            comparison = Comparison(f"{same[0].op}, {same[0].dtype}", str(same[-1].conditions))
            flops = statistics.median(line.conditions.flops for line in same)
            bandwidth = statistics.median(line.conditions.read_bandwidth for line in same)
            data[comparison] = Roof(flops, bandwidth, speeds)
    return data


def _speed(line: OpResult) -> Speed | None:
    """The speed of a provider; ``None`` if it has no floor, because it does more work than it must."""
    from grasp.bench.workloads import OPS, low_rank_costs

    if line.op not in OPS or line.dtype not in _ITEM_BYTES:
        known = f"one of {', '.join(OPS)} in {', '.join(_ITEM_BYTES)}"
        raise ResultsError(f"results of the op {line.op!r} in {line.dtype}; expected {known}")
    if not line.median_us > 0:
        raise ResultsError(f"{line.op} took {line.median_us} µs; expected a time above 0")
    if line.floor_us is None:
        return None
    shape, itemsize = parse_shape(line.shape), _ITEM_BYTES[line.dtype]
    reads_quantized = line.weights is not None and line.provider in {row.name for row in BACKENDS}
    storages = parse_storages(line.weights if reads_quantized else None, len(shape))
    if line.provider == "dense":
        costs = [cost for K, N, _ in shape for cost in roofline.dense_linear(line.rows, N, K, itemsize=itemsize)]
    else:
        costs = low_rank_costs(line.op, shape, line.rows, itemsize, parse_forms(line.form, len(shape)), storages)
    flops = sum(cost.flops for cost in costs)
    label = _PROVIDERS.get(line.provider, line.provider) + f", {line.weights}" * reads_quantized
    return Speed(label, flops / sum(cost.bytes for cost in costs), flops / line.median_us * 1e6)


def _prompt(result: ModelResult) -> str:
    return f"{result.prompt_tokens} tokens" + f" after {result.depth}" * (result.depth > 0)


def _text(result: ModelResult) -> str:
    return f"{result.perplexity_tokens} tokens of {result.perplexity_text}"


def _weights(result: ModelResult) -> str:
    """Label of the weights that a perplexity is of, without their backend."""
    owner = result.provider.partition("/")[0]
    if owner != "compressed":
        return _PROVIDERS.get(owner, owner)
    return result.factors if result.factors == PLAIN_SVD else f"GRASP {result.factors}"


def _setting(result: ModelResult) -> str:
    """What results of one figure have in common besides the model and the prompt."""
    changed = f"{len(result.layers)} layers changed, retain ratio {result.retain_ratio:.3g}; factors: {result.factors}"
    return f"{result.new_tokens} new tokens; {changed}; {result.dtype}; {result.conditions}"


def _provider(result: ModelResult) -> str:
    provider, _, backend = result.provider.partition("/")
    name = _PROVIDERS.get(provider, provider)
    if provider == "compressed":
        name = "low-rank" if result.factors == PLAIN_SVD else "GRASP"
    return ", ".join(part for part in (name, backend, result.mode * (result.mode != "eager")) if part)
