from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from grasp.cli.arguments import parse_bytes
from grasp.compression.eligible import eligible_targets
from grasp.compression.layer_cost import Tracer
from grasp.compression.memory import CODE_BYTES, code_bytes, needs_of, retained_groups, statistics_bytes
from grasp.compression.span_plan import LayerNeeds, PlannedSpan, SpanMemory
from grasp.config import GraspConfig
from grasp.errors import OutOfMemoryError
from grasp.model.targets import Target
from grasp.statistics.covariance import covariance_bytes, input_groups
from tests.tiny_models import tiny_model

NAMES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def linear(layer: int, name: str, n: int, k: int) -> Target:
    block = "attention" if name in NAMES[:4] else "mlp"
    return Target(f"model.layers.{layer}.{block}.{name}", layer, block, nn.Linear(k, n, device="meta"))


def decomposition_bytes(target: Target) -> int:
    return 8 * target.module.weight.numel()


@st.composite
def memories(draw: st.DrawFn) -> SpanMemory:
    depth = draw(st.integers(1, 6))
    sizes = st.integers(1, 40)
    names = st.lists(st.sampled_from(NAMES), max_size=7, unique=True)
    targets = [linear(layer, name, draw(sizes), draw(sizes)) for layer in range(depth) for name in draw(names)]
    if not targets:
        targets = [linear(depth - 1, "o_proj", 3, 5)]
    layers = range(min(target.layer for target in targets), depth)
    bytes_ = st.integers(0, 20_000)
    needs = {layer: LayerNeeds(draw(bytes_), draw(bytes_)) for layer in layers}
    fixed, head, other = draw(bytes_), draw(bytes_), draw(bytes_)
    return SpanMemory(targets, layers, needs, fixed, head, covariance_bytes, decomposition_bytes, other)


def peaks(memory: SpanMemory, spans: Collection[PlannedSpan]) -> list[int]:
    return [memory.peak(span.layers, part) for span in spans for part in span.parts]


@given(memories(), st.integers(0, 200_000))
def test_spans_cover_the_layers_and_every_target_once_within_the_budget(memory: SpanMemory, more: int) -> None:
    budget = memory.least() + more
    spans = memory.plan(budget)
    assert [layer for span in reversed(spans) for layer in span.layers] == list(memory.layers)
    planned = [target.name for span in spans for part in span.parts for target in part]
    assert sorted(planned) == sorted(target.name for target in memory.targets)
    assert all(target.layer in span.layers for span in spans for part in span.parts for target in part)
    assert max(peaks(memory, spans)) <= budget
    assert all(len(span.parts) == 1 for span in spans if len(span.layers) > 1)
    assert all(span.parts for span in spans)


@given(memories(), st.integers(0, 200_000))
def test_no_two_neighbours_would_fit_together(memory: SpanMemory, more: int) -> None:
    budget = memory.least() + more
    for upper, lower in pairwise(memory.plan(budget)):
        members = tuple(target for span in (lower, upper) for part in span.parts for target in part)
        grown = range(lower.layers.stop - 1, upper.layers.stop)
        joined = [target for target in members if target.layer in grown]
        assert memory.peak(grown, joined) > budget


@given(memories())
def test_everything_that_fits_together_is_one_span(memory: SpanMemory) -> None:
    (span,) = memory.plan(memory.most())
    assert span.layers == memory.layers
    assert len(span.parts) == 1


@given(memories())
def test_the_least_budget_works_and_one_byte_less_does_not(memory: SpanMemory) -> None:
    least = memory.least()
    assert max(memory.fixed + memory.other, *peaks(memory, memory.plan(least))) == least
    with pytest.raises(OutOfMemoryError):
        memory.plan(least - 1)


@given(memories())
def test_linears_that_share_an_input_stay_together(memory: SpanMemory) -> None:
    parts = [set(part) for span in memory.plan(memory.least()) for part in span.parts]
    for group in input_groups(memory.targets):
        assert sum(bool(part & set(group)) for part in parts) == 1


def test_the_message_has_an_argument_that_works() -> None:
    targets = [linear(layer, name, 1000, 1500) for layer in range(2) for name in NAMES]
    needs = dict.fromkeys(range(2), LayerNeeds(10**6, 10**6))
    memory = SpanMemory(targets, range(2), needs, 10**7, 10**7, covariance_bytes, decomposition_bytes)
    with pytest.raises(OutOfMemoryError, match=r"--memory [0-9]+MB .* --seq-len.* --batch-size") as refused:
        memory.plan(10**6)
    (amount,) = re.findall(r"--memory (\S+)", str(refused.value))
    assert memory.plan(parse_bytes(amount))


def test_a_layer_that_does_not_fit_runs_once_for_each_part() -> None:
    targets = [linear(0, name, 100, 100) for name in NAMES]
    one = 4 * 100 * 100  # bytes of one sum
    memory = SpanMemory(targets, range(1), {0: LayerNeeds(0, 0)}, 0, 0, covariance_bytes, lambda target: 0)
    (span,) = memory.plan(5 * one)  # the sums: q k v and their input 4, gate and up 3, o 2, down 2
    assert [sorted(target.name.rpartition(".")[2] for target in part) for part in span.parts] == [
        ["k_proj", "q_proj", "v_proj"],
        ["gate_proj", "o_proj", "up_proj"],
        ["down_proj"],
    ]
    assert peaks(memory, [span]) == [4 * one, 5 * one, 2 * one]


def test_layers_above_the_highest_target_only_pass_the_gradient() -> None:
    memory = SpanMemory(
        [linear(1, "o_proj", 10, 10)],
        range(1, 4),
        dict.fromkeys(range(1, 4), LayerNeeds(1000, 0)),
        0,
        0,
        covariance_bytes,
        lambda target: 0,
    )
    spans = memory.plan(2 * 1000)
    assert [(span.layers, [len(part) for part in span.parts]) for span in spans] == [
        (range(2, 4), [0]),
        (range(1, 2), [1]),
    ]


def test_the_head_counts_for_the_deepest_span_only() -> None:
    targets = [linear(layer, "o_proj", 10, 10) for layer in range(2)]
    needs = dict.fromkeys(range(2), LayerNeeds(1000, 10))
    memory = SpanMemory(targets, range(2), needs, 0, 5000, covariance_bytes, lambda target: 0)
    assert memory.peak(range(2), []) == 2000 + 5000  # the logits are gone before the temporaries of the layers come
    assert memory.peak(range(1), []) == 1000 + 10
    assert memory.peak(range(1, 2), []) == 1000 + 5000


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "phi3"])
def test_needs_of_a_family_grow_with_the_batch_and_with_low_rank_factors(family: str) -> None:
    def needs(batch_size: int, rank: int = 0, visited: int | None = None) -> list[LayerNeeds]:
        config, cpu = tiny_model(family).config, torch.device("cpu")
        tracer = Tracer(config, dtype=torch.float32, device=cpu, batch_size=batch_size, seq_len=16)
        targets = [target for linears in eligible_targets(tracer.model)[0].values() for target in linears]
        ranks = {target.name: rank for target in targets if rank}
        return list(needs_of(tracer, targets[:visited], range(3), ranks).values())

    one, two, low = needs(1), needs(2), needs(1, rank=4)
    resumed, dense = needs(1, rank=4, visited=0), needs(1, visited=0)  # the linears of a run that are done
    assert all(later.activations > before.activations for later, before in zip(resumed, dense, strict=True))
    for small, large, factored in zip(one, two, low, strict=True):
        assert 1.5 * small.activations < large.activations <= 2 * small.activations
        assert small.temporaries < large.temporaries
        assert factored.activations > small.activations


def test_a_span_of_a_model_keeps_no_more_than_its_layers_need() -> None:
    targets = [linear(layer, "o_proj", 10, 10) for layer in range(3)]
    needs = {0: LayerNeeds(1, 50), 1: LayerNeeds(2, 70), 2: LayerNeeds(4, 60)}
    memory = SpanMemory(targets, range(3), needs, 1000, 0, lambda part: 0, lambda target: 0)
    assert memory.peak(range(2), []) == 1000 + 3 + 70
    slow = replace(memory, decomposition_bytes=lambda target: 500)
    assert slow.peak(range(2), targets[:2]) == 1000 + 500


def test_the_code_of_products_is_what_onednn_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    config, cpu = tiny_model("llama").config, torch.device("cpu")
    tracer = Tracer(config, dtype=torch.bfloat16, device=cpu, batch_size=1, seq_len=16)
    targets = [target for linears in eligible_targets(tracer.model)[0].values() for target in linears]
    assert code_bytes(tracer, targets, None) > 3 * CODE_BYTES
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "3")
    assert code_bytes(tracer, targets, None) == 3 * CODE_BYTES
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "1k")
    with pytest.raises(ValueError, match="ONEDNN_PRIMITIVE_CACHE_CAPACITY must be a whole number of shapes, got '1k'"):
        code_bytes(tracer, targets, None)


def test_a_threshold_and_first_order_scores_read_all_groups() -> None:
    config = GraspConfig(num_layers=1, basis="kfac", metric="magnitude", retain_ratio=0.1)
    assert retained_groups(config, (64, 64)) == 31
    assert retained_groups(replace(config, threshold_ratio=0.9), (64, 64)) is None
    assert retained_groups(GraspConfig(num_layers=1), (64, 64)) is None


def test_moments_are_held_beside_the_covariances_of_their_basis() -> None:
    targets = [linear(0, name, 96, 64) for name in NAMES]

    def taken(basis: str, metric: str) -> int:
        return statistics_bytes(targets, GraspConfig(basis=basis, metric=metric, schedule="single-sweep"), 1000)

    groups = taken("plain", "fisher")
    assert groups == len(targets) * 4 * 64 * (96 + 64 + 2)
    assert taken("kfac", "fisher") == taken("kfac", "magnitude") + groups
    assert taken("plain", "magnitude") == 0
