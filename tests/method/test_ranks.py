from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from grasp.method.ranks import (
    FORMS,
    Budget,
    Form,
    break_even_rank,
    parameters_at,
    parameters_removed,
    rank_for_retain_ratio,
    rank_for_threshold,
    redundant_layers,
    retained_indices,
    solve_compression_ratio,
)
from grasp.model.lowrank_linear import LowRankLinear

sizes = st.integers(1, 300)
shapes = st.tuples(sizes, sizes)
forms = st.sampled_from(FORMS)


def test_ranks_of_the_paper() -> None:
    assert rank_for_retain_ratio((4096, 4096), 0.1, "factored") == 204
    assert rank_for_retain_ratio((11008, 4096), 0.1, "factored") == 298


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shape", [(2, 2), (64, 24), (24, 64)])
def test_parameters_are_those_of_the_layer(shape: tuple[int, int], form: Form) -> None:
    n, k = shape
    for rank in range(1, break_even_rank(shape, form) + 1):
        layer = LowRankLinear(k, n, rank, bias=False, pivoted=form == "pivoted", device="meta")
        assert parameters_at(shape, rank, form) == sum(p.numel() for p in layer.parameters())


@given(shapes, st.floats(0.001, 1), forms)
def test_a_matrix_retains_its_share_and_the_next_rank_is_above_it(
    shape: tuple[int, int], ratio: float, form: Form
) -> None:
    rank, retained = rank_for_retain_ratio(shape, ratio, form), ratio * math.prod(shape)
    assert rank >= 1
    assert rank == 1 or parameters_at(shape, rank, form) <= retained * (1 + 1e-9)
    assert rank + 1 >= min(shape) or parameters_at(shape, rank + 1, form) >= retained * (1 - 1e-9)


@given(shapes, forms)
def test_break_even_is_the_last_rank_that_saves(shape: tuple[int, int], form: Form) -> None:
    rank = break_even_rank(shape, form)
    assert rank == 0 or parameters_removed(shape, rank, form) > 0
    assert parameters_removed(shape, rank + 1, form) <= 0


def test_most_important_groups_are_kept_in_order_and_ties_go_to_the_larger_singular_value() -> None:
    importance = torch.tensor([1.0, 5.0, 3.0, 3.0, 0.0])
    assert retained_indices(importance, 1).tolist() == [1]
    assert retained_indices(importance, 2).tolist() == [1, 2]
    assert retained_indices(importance, 3).tolist() == [1, 2, 3]
    assert retained_indices(torch.zeros(64), 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("rank", [0, 6])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=f"between 1 and the 5 singular groups, got {rank}"):
        retained_indices(torch.ones(5), rank)


def test_threshold_takes_the_fewest_groups_that_reach_the_share() -> None:
    importance = torch.tensor([1.0, 4.0, 3.0, 2.0])  # 4, 7, 9, 10 of 10
    wide = (1000, 1000)
    assert [rank_for_threshold(importance, share, wide, "factored") for share in (0.1, 0.4, 0.41, 0.7, 0.9, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
        4,
    ]


def test_threshold_is_capped_at_break_even() -> None:
    assert rank_for_threshold(torch.ones(10), 1.0, (10, 10), "factored") == 4
    assert rank_for_threshold(torch.ones(10), 1.0, (10, 10), "pivoted") == 9


def test_redundant_layers_are_the_least_influential_and_ties_go_to_the_shallower() -> None:
    assert redundant_layers([0.3, 0.1, 0.2, 0.1], 3) == (1, 3, 2)


def test_no_compression_takes_no_layer() -> None:
    assert solve_compression_ratio({0: [(64, 64)]}, [0], 8192, 0.0, 0.1, "factored") == Budget(0.1, {})


@given(st.integers(2, 8), st.floats(0.01, 0.6), st.floats(0.05, 0.9), forms, st.booleans())
def test_the_ratio_is_met_with_the_fewest_layers(
    count: int, target: float, retain: float, form: Form, at_least: bool
) -> None:
    layer = [(512, 512), (256, 512), (1024, 512)]
    shapes = dict.fromkeys(range(count), layer)
    dense = sum(n * k for n, k in layer)
    total = count * dense + 100_000
    order = list(range(count))[::-1]
    per_layer_at_retain = sum(parameters_removed(s, rank_for_retain_ratio(s, retain, form), form) for s in layer)
    budget = solve_compression_ratio(shapes, order, total, target, retain, form, at_least=at_least)
    removed = sum(
        parameters_removed(shape, rank, form)
        for ranks in budget.ranks.values()
        for shape, rank in zip(layer, ranks, strict=True)
    )
    step = max(n + k for n, k in layer)
    assert (0 if at_least else -step) <= removed - target * total <= step
    fewest = next((n for n in range(1, count + 1) if n * per_layer_at_retain >= target * total), count)
    assert list(budget.ranks) == sorted(order[:fewest])
    for ranks in budget.ranks.values():
        for shape, rank in zip(layer, ranks, strict=True):
            assert rank - rank_for_retain_ratio(shape, budget.retain_ratio, form) in (0, 1)


def test_an_unreachable_ratio_says_what_is_reachable() -> None:
    with pytest.raises(ValueError, match=r"compression_ratio=0.9 asks for .* the largest possible ratio is 0\.4844"):
        solve_compression_ratio({0: [(64, 64)]}, [0], 8192, 0.9, 0.1, "factored")
