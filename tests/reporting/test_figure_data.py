from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from grasp.bench.percentiles import Percentiles
from grasp.bench.records import ModelResult, OpResult
from grasp.reporting.figure_data import Trade, by_size, latencies, pareto_front, roofs, trades
from tests.bench.records import CONDITIONS, record


def model(provider: str, **values: Any) -> Any:
    plain = {"model": "builtin", "factors": "small", "dtype": "float32", "batch_size": 1, "mode": "eager"}
    plain["perplexity_text"] = "builtin"
    return record(ModelResult, **{**plain, "provider": provider, **values})


def op(provider: str, **values: Any) -> Any:
    plain = {"op": "lowrank_linear", "shape": "4x6r2", "rows": 1, "dtype": "float32", "median_us": 2.0, "floor_us": 1.0}
    return record(OpResult, **{**plain, "provider": provider, **values})


def only(data: dict[Any, Any]) -> Any:
    (value,) = data.values()
    return value


def test_the_front_is_what_no_point_beats() -> None:
    numbers = random.Random(0)
    for _ in range(50):
        places = {(numbers.randrange(6), numbers.randrange(6)) for _ in range(8)}
        expected = {(x, y) for x, y in places if not any(a <= x and b <= y and (a, b) != (x, y) for a, b in places)}
        assert pareto_front(places) == sorted(expected)


def test_perplexities_of_different_texts_do_not_share_a_figure() -> None:
    assert len(by_size([model("dense"), model("dense", perplexity_tokens=9)])) == 2


def test_the_weights_that_several_backends_share_are_one_point_of_size() -> None:
    lines = [model(name) for name in ("dense", "compressed/cpu", "compressed/reference", "unfused", "removed")]
    lines.append(model("compressed", factors="plain SVD"))
    lines.append(model("compressed", factors="other"))
    labels = [p.label for p in only(by_size(lines))]
    assert labels == ["dense", "GRASP small", "layers removed", "plain SVD", "GRASP other"]


def test_a_speed_stands_beside_bytes_and_a_perplexity_if_there_is_one() -> None:
    fast = {"decode_tokens_per_s": 70.0, "weight_bytes": 9}
    lines = [model("dense", decode_tokens_per_s=60.0), model("dense", **fast), model("removed", perplexity=None)]
    dense, removed = only(trades(lines))
    assert (dense, removed) == (Trade("dense", 70.0, 9, 0.5), Trade("layers removed", 0.5, 3, None))
    assert len(trades([model("dense"), model("dense", batch_size=4), model("dense", depth=5)])) == 3


def test_the_last_measurement_of_a_provider_counts() -> None:
    first, again = (model("compressed/cpu", first_token_ms=Percentiles(ms, ms, ms)) for ms in (1.0, 2.0))
    (bar,) = only(latencies([first, again]))
    assert (bar.label, bar.first_token.p50) == ("GRASP, cpu", 2.0)


def test_compiled_steps_are_beside_eager_ones() -> None:
    lines = [model("dense"), model("dense", mode="compiled"), model("compressed/cpu", mode="compiled")]
    labels = ["dense", "dense, compiled", "GRASP, cpu, compiled"]
    assert [bar.label for bar in only(latencies(lines))] == labels
    assert [trade.label for trade in only(trades(lines))] == labels


@pytest.mark.parametrize(
    "values",
    [
        {"dtype": "bfloat16"},
        {"prompt_tokens": 9},
        {"depth": 5},
        {"new_tokens": 9},
        {"retain_ratio": 0.25},
        {"conditions": replace(CONDITIONS, threads=1)},
        {"factors": "other"},
    ],
)
def test_times_of_different_conditions_do_not_share_a_figure(values: dict[str, Any]) -> None:
    for figures in (latencies, trades):
        assert len(figures([model("dense"), model("dense", **values)])) == 2


def test_batch_sizes_share_a_figure_of_latencies() -> None:
    bars = only(latencies([model("dense", batch_size=1), model("dense", batch_size=4)]))
    assert [bar.batch_size for bar in bars] == [1, 4]


def test_a_speed_is_the_flops_that_must_be_done_over_the_time() -> None:
    roof = only(roofs([op("cpu"), op("dense"), op("unfused", median_us=4.0)]))
    assert (roof.flops, roof.bandwidth) == (CONDITIONS.flops, CONDITIONS.read_bandwidth)
    # K = 4, N = 6, R = 2, one row: 2·R·(N + K) = 40 FLOPs over (R·(N + K) + N + K)·4 = 120 bytes; dense 48 over 136.
    assert [(s.label, s.intensity, s.flops) for s in roof.speeds] == [
        ("cpu", pytest.approx(40 / 120), pytest.approx(20e6)),
        ("dense", pytest.approx(48 / 136), pytest.approx(24e6)),
        ("unfused", pytest.approx(40 / 120), pytest.approx(10e6)),
    ]
    # Quantised: one byte for each of the 20 values, and 6 + 2 scales of 4 bytes.
    quantised = only(roofs([op(name, weights="int8") for name in ("cpu", "floating", "dense")]))
    assert [(s.label, s.intensity) for s in quantised.speeds] == [
        ("cpu, int8", pytest.approx(40 / (20 + 32 + 40))),
        ("floating", pytest.approx(40 / 120)),
        ("dense", pytest.approx(48 / 136)),
    ]


def test_what_has_no_floor_has_no_place_below_the_roof() -> None:
    assert roofs([op("dense", op="singular_value_grad", floor_us=None)]) == {}


def test_each_op_dtype_and_device_has_a_roof() -> None:
    lines = [op("cpu"), op("cpu", dtype="bfloat16"), op("cpu", op="singular_value_grad")]
    lines.append(op("cpu", conditions=replace(CONDITIONS, threads=1)))
    assert len(roofs(lines)) == 4
