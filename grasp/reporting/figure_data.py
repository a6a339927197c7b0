"""What the figures of measured results show: records sorted into settings that may be compared. Pure functions."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from grasp.errors import ResultsError
from grasp_kernels import roofline
from grasp_kernels.shapes import parse_shape

if TYPE_CHECKING:
    from grasp.bench.conditions import Conditions
    from grasp.bench.results import ModelResult, OpResult, Percentiles, Record, StudyResult


Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

PLAIN_SVD = "plain SVD"  # the factors of a model that was compressed for its speed alone
_PROVIDERS = {"dense": "dense", "removed": "layers removed", "unfused": "unfused", "compiled": "torch.compile"}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Setting(NamedTuple):
    """What a figure's points have in common, and so may be compared; in words."""

    title: str
    conditions: str


class Quality(NamedTuple):
    """Perplexity at a size or a latency; several seeds have a mean and a range."""

    label: str
    x: float
    perplexity: float
    low: float
    high: float


class Latency(NamedTuple):
    """One provider's times at one batch size, in ms."""

    label: str
    batch_size: int
    first_token: Percentiles
    inter_token: Percentiles


class Speed(NamedTuple):
    """One provider at one shape: FLOPs per byte that must be moved, and FLOPs per second."""

    label: str
    intensity: float
    flops: float


class Roof(NamedTuple):
    """What a device was measured to do, in FLOP/s and bytes/s; and who reached how much."""

    flops: float
    bandwidth: float
    speeds: tuple[Speed, ...]


def where(conditions: Conditions) -> str:
    """``"Xeon, 2 threads"``."""
    threads = conditions.threads
    return conditions.device + ("" if threads is None else f", {threads} thread{'s' if threads > 1 else ''}")


def state(conditions: Conditions) -> str:
    """Device, versions, commit and day of a measurement."""
    commit = f"commit {conditions.commit[:10]}" if conditions.commit else "no commit"
    changed = " with changes" if conditions.dirty else ""
    return f"{where(conditions)}; torch {conditions.torch}; {commit}{changed}; {conditions.started[:10]}"


def pareto_front(points: Iterable[Quality]) -> list[Quality]:
    """The points that no other beats in x and perplexity at once, by ascending x."""
    front: list[Quality] = []
    for point in sorted(points, key=lambda point: (point.x, point.perplexity)):
        if not front or point.perplexity < front[-1].perplexity:
            front.append(point)
    return front


def by_size(records: Sequence[Record]) -> dict[Setting, list[Quality]]:
    """Perplexity against parameters, for each text that it was measured on."""
    found: dict[Setting, list[Quality]] = defaultdict(list)
    for setting, cells in _studies(records).items():
        for (method, _), same in _grouped(cells, lambda cell: (cell.method, cell.ratio)).items():
            values = [cell.perplexity for cell in same]
            size = statistics.mean(cell.parameters for cell in same)
            found[setting].append(Quality(method, size, statistics.mean(values), min(values), max(values)))
    for result in _with_perplexity(records):
        if result.provider != "unfused" and result.perplexity is not None:  # unfused: the weights of another
            setting = Setting(f"{result.model}, {_text(result)}", f"{result.dtype}; {state(result.conditions)}")
            label = _weights(result)
            point = Quality(label, result.parameters, *[result.perplexity] * 3)
            if point not in found[setting]:
                found[setting].append(point)
    return dict(found)


def by_latency(records: Sequence[Record]) -> dict[Setting, list[Quality]]:
    """Perplexity against the median time from token to token in ms, for each batch size."""
    found: dict[Setting, dict[str, Quality]] = defaultdict(dict)
    for result in _with_perplexity(records):
        assert result.perplexity is not None
        setting = Setting(
            f"{result.model}, {_text(result)}, batch {result.batch_size}",
            f"Prompt of {result.prompt_tokens} tokens; {result.dtype}; {state(result.conditions)}",
        )
        label = _provider(result)
        found[setting][label] = Quality(label, result.inter_token_ms.p50, *[result.perplexity] * 3)
    return {setting: list(points.values()) for setting, points in found.items()}


def latencies(records: Sequence[Record]) -> dict[Setting, list[Latency]]:
    """Times of the providers of each model; where a provider was measured again, the last counts."""
    found: dict[Setting, dict[tuple[str, int], Latency]] = defaultdict(dict)
    for result in _models(records):
        setting = Setting(
            f"{result.model}, prompt of {result.prompt_tokens} tokens",
            f"{len(result.layers)} layers changed; factors: {result.factors}; {result.dtype}; "
            f"{state(result.conditions)}",
        )
        label = _provider(result)
        found[setting][label, result.batch_size] = Latency(
            label, result.batch_size, result.first_token_ms, result.inter_token_ms
        )
    return {setting: list(bars.values()) for setting, bars in found.items()}


def roofs(records: Sequence[Record]) -> dict[Setting, Roof]:
    """For each op, device and dtype what was reached of what that device was measured to do in the same run."""
    ops: list[OpResult] = [record for record in records if record.kind == "op"]  # type: ignore[misc]  # by its kind
    result: dict[Setting, Roof] = {}
    for same in _grouped(ops, lambda line: (line.op, line.dtype, where(line.conditions))).values():
        speeds = tuple(speed for line in same if (speed := _speed(line)) is not None)
        if speeds:
            setting = Setting(f"{same[0].op}, {same[0].dtype}", state(same[-1].conditions))
            flops = statistics.median(line.conditions.flops for line in same)
            bandwidth = statistics.median(line.conditions.read_bandwidth for line in same)
            result[setting] = Roof(flops, bandwidth, speeds)
    return result


def _speed(line: OpResult) -> Speed | None:
    """What a line reached; nothing for a provider that does other work than it must, which has no floor either."""
    from grasp.bench.workloads import OPS

    if line.op not in OPS or line.dtype not in _ITEM_BYTES:
        known = f"one of {', '.join(OPS)} in {', '.join(_ITEM_BYTES)}"
        raise ResultsError(f"results of the op {line.op!r} in {line.dtype}; expected {known}")
    if not line.median_us > 0:
        raise ResultsError(f"{line.op} took {line.median_us} µs; expected a time above 0")
    if line.floor_us is None:
        return None
    shape, itemsize = parse_shape(line.shape), _ITEM_BYTES[line.dtype]
    if line.provider == "dense":
        costs = [cost for K, N, _ in shape for cost in roofline.dense_linear(line.rows, N, K, itemsize=itemsize)]
    else:
        costs = list(OPS[line.op].cost(line.rows, shape, itemsize))
    flops = sum(cost.flops for cost in costs)
    label = _PROVIDERS.get(line.provider, line.provider)
    return Speed(label, flops / sum(cost.bytes for cost in costs), flops / line.median_us * 1e6)


def _models(records: Iterable[Record]) -> list[ModelResult]:
    return [record for record in records if record.kind == "model"]  # type: ignore[misc]  # by its kind


def _with_perplexity(records: Iterable[Record]) -> list[ModelResult]:
    return [result for result in _models(records) if result.perplexity is not None]


def _studies(records: Iterable[Record]) -> Mapping[Setting, list[StudyResult]]:
    cells: list[StudyResult] = [record for record in records if record.kind == "study"]  # type: ignore[misc]
    found: dict[Setting, list[StudyResult]] = {}
    for study, same in _grouped(cells, lambda cell: cell.setting).items():
        windows = "all windows" if study.windows is None else f"{study.windows} windows"
        title = f"{study.model}, {windows} of {study.window} tokens of {study.text}"
        calibrated = f"Calibrated on {study.num_samples} sequences of {study.seq_len} tokens of {study.calibration}"
        found[Setting(title, f"{calibrated}; {study.dtype}; {state(same[-1].conditions)}")] = same
    return found


def _text(result: ModelResult) -> str:
    return f"{result.perplexity_tokens} tokens of {result.perplexity_text}"


def _weights(result: ModelResult) -> str:
    """Which weights a perplexity is of: backends have those of the compressed model."""
    if result.provider.partition("/")[0] != "compressed":
        return _PROVIDERS.get(result.provider, result.provider)
    return result.factors if result.factors == PLAIN_SVD else f"GRASP {result.factors}"


def _provider(result: ModelResult) -> str:
    kind, _, backend = result.provider.partition("/")
    if kind != "compressed":
        return _PROVIDERS.get(kind, kind)
    name = "low-rank" if result.factors == PLAIN_SVD else "GRASP"
    return f"{name}, {backend}" if backend else name


def _grouped(items: Iterable[Item], key: Callable[[Item], Key]) -> dict[Key, list[Item]]:
    found: dict[Key, list[Item]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return dict(found)
