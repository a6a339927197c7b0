from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grasp.method.knapsack import DENSE, Choices, Layer, allocate_layers, rank_choices


def allocate(matrices: Sequence[Choices], budget: float) -> list[int]:
    """``allocate_layers`` for matrices of which none can go: the index of each one's choice."""
    picked = allocate_layers([Layer([choices]) for choices in matrices], budget)
    return [choice for layer in picked if layer is not None for choice in layer]


def brute_force(matrices: list[Choices], budget: float) -> float:
    """The least loss within the budget, by trying everything."""
    return min(
        sum(m.losses[j] for m, j in zip(matrices, picked, strict=True))
        for picked in itertools.product(*(range(len(m.costs)) for m in matrices))
        if sum(m.costs[j] for m, j in zip(matrices, picked, strict=True)) <= budget + 1e-12
    )


def brute_force_layers(layers: list[Layer], budget: float) -> float:
    """The least loss within the budget, over all sets of layers that may go."""
    return min(
        math.fsum(layer.removal or 0 for layer in gone)
        + brute_force([m for layer in kept for m in layer.matrices], budget - sum(layer.rest for layer in kept))
        for going in itertools.product(*((False, layer.removal is not None) for layer in layers))
        if (gone := [layer for layer, goes in zip(layers, going, strict=True) if goes]) is not None
        and (kept := [layer for layer, goes in zip(layers, going, strict=True) if not goes]) is not None
        and sum(layer.rest + sum(min(m.costs) for m in layer.matrices) for layer in kept) <= budget
    )


def random_choices(rng: random.Random, groups: int, whole: bool) -> Choices:
    scores = [rng.expovariate(1) ** 3 for _ in range(groups)]
    unit = rng.randint(2, 9) if whole else rng.uniform(1, 5)
    ranks, costs, losses = rank_choices(scores, [unit * r for r in range(groups + 1)], unit * rng.randint(2, groups))
    return Choices((0, *ranks), (0.0, *costs), (sum(scores), *losses))  # so that any budget can be kept


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1))
def test_finds_the_optimum_that_trying_everything_finds(seed: int, share: float) -> None:
    rng = random.Random(seed)
    matrices = [random_choices(rng, rng.randint(2, 5), whole=True) for _ in range(4)]
    budget = math.floor(share * sum(max(m.costs) for m in matrices))
    picked = allocate(matrices, budget)
    cost = sum(m.costs[j] for m, j in zip(matrices, picked, strict=True))
    assert cost <= budget
    assert sum(m.losses[j] for m, j in zip(matrices, picked, strict=True)) == pytest.approx(
        brute_force(matrices, budget)
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_costs_that_are_no_whole_numbers_lose_next_to_nothing_to_rounding(seed: int) -> None:
    rng = random.Random(seed)
    matrices = [random_choices(rng, 4, whole=False) for _ in range(4)]
    budget = 0.5 * sum(max(m.costs) for m in matrices)
    picked = allocate(matrices, budget)
    loss = sum(m.losses[j] for m, j in zip(matrices, picked, strict=True))
    assert sum(m.costs[j] for m, j in zip(matrices, picked, strict=True)) <= budget
    assert loss <= brute_force(matrices, budget * (1 - 4 / 20_000)) * (1 + 1e-9)


def losses_and_costs(layers: list[Layer], picked: list[list[int] | None]) -> tuple[float, float]:
    loss = cost = 0.0
    for layer, chosen in zip(layers, picked, strict=True):
        if chosen is None:
            assert layer.removal is not None
            loss += layer.removal
            continue
        cost += layer.rest + sum(m.costs[j] for m, j in zip(layer.matrices, chosen, strict=True))
        loss += sum(m.losses[j] for m, j in zip(layer.matrices, chosen, strict=True))
    return loss, cost


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0, 1), whole=st.booleans())
def test_layers_go_where_trying_everything_lets_them_go(seed: int, share: float, whole: bool) -> None:
    rng = random.Random(seed)
    layers = [
        Layer(
            [random_choices(rng, rng.randint(2, 3), whole=whole) for _ in range(2)],
            rest=rng.randint(0, 5),
            removal=rng.choice([None, rng.expovariate(1)]),
        )
        for _ in range(3)
    ]
    least = [layer.rest + sum(min(m.costs) for m in layer.matrices) for layer in layers if layer.removal is None]
    most = sum(layer.rest + sum(max(m.costs) for m in layer.matrices) for layer in layers)
    budget = sum(least) + share * (most - sum(least))
    budget = math.ceil(budget) if whole else budget
    loss, cost = losses_and_costs(layers, picked := allocate_layers(layers, budget))
    assert cost <= budget + 1e-9
    rounding = 0.0 if whole else 10 / 20_000 * (budget - sum(least))  # a step for each of 9 costs
    assert loss <= brute_force_layers(layers, budget - rounding) + 1e-9
    assert all(chosen is not None or layer.removal is not None for layer, chosen in zip(layers, picked, strict=True))


def test_a_layer_goes_where_what_is_beside_its_matrices_is_dear() -> None:
    matrices = [rank_choices([2.0, 1.0], [0.0, 2.0, 4.0], 3.0)] * 2  # rank 1: cost 2, loss 1; dense: 3, 0
    cheap, dear = Layer(matrices, rest=0.0, removal=5.0), Layer(matrices, rest=4.0, removal=5.0)
    assert allocate_layers([cheap, dear], 16.0) == [[1, 1], [1, 1]]
    assert allocate_layers([cheap, dear], 8.0) == [[1, 1], None]
    assert allocate_layers([cheap, dear], 0.0) == [None, None]
    with pytest.raises(ValueError, match="budget is 3, but the cheapest choices cost 4"):
        allocate_layers([cheap._replace(removal=None), dear], 3.0)


def test_a_matrix_that_matters_more_than_its_share_stays_dense() -> None:
    shape_costs = [20.0 * rank for rank in range(11)]
    dear = rank_choices([100.0] * 10, shape_costs, 100)
    cheap = rank_choices([10.0, 5.0, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3, 1e-3], shape_costs, 100)
    picked = allocate([dear, cheap], 150)
    assert [dear.ranks[picked[0]], cheap.ranks[picked[1]]] == [DENSE, 2]


def test_ranks_come_in_multiples_below_the_break_even() -> None:
    choices = rank_choices([1.0] * 100, [30.0 * rank for rank in range(101)], 1000, multiple=16)
    assert choices.ranks == (*range(1, 16), 16, 32, DENSE)
    assert choices.losses[-2:] == (68.0, 0.0)


def test_a_budget_below_the_cheapest_choices_is_refused_with_both() -> None:
    with pytest.raises(ValueError, match="budget is 5, but the cheapest choices cost 20"):
        allocate([rank_choices([1.0, 1.0], [0.0, 10.0, 20.0], 40.0)] * 2, 5)


def test_nothing_to_choose_from_costs_nothing() -> None:
    assert allocate([], 0) == []


def test_a_budget_of_everything_keeps_everything_dense() -> None:
    matrices = [rank_choices([3.0, 2.0, 1.0], [0.0, 2.0, 4.0, 6.0], 5.0)] * 3
    assert [matrices[0].ranks[j] for j in allocate(matrices, 15.0)] == [DENSE] * 3


def test_many_matrices_come_within_two_ten_thousandths_of_a_bound_below_the_optimum() -> None:
    rng = random.Random(3)
    matrices = []
    for _ in range(200):
        n, k = rng.choice([(256, 256), (512, 256), (96, 256)])
        scores = [rng.expovariate(1) ** 3 for _ in range(min(n, k))]
        matrices.append(rank_choices(scores, [float(rank * (n + k)) for rank in range(min(n, k) + 1)], n * k))
    budget = 0.6 * sum(choices.costs[-1] for choices in matrices)
    loss = sum(m.losses[j] for m, j in zip(matrices, allocate(matrices, budget), strict=True))
    assert loss <= dual_bound(matrices, budget) * (1 + 2e-4)


def dual_bound(matrices: list[Choices], budget: float) -> float:
    """No solution within the budget has less loss (weak duality): the best over prices of a unit of cost."""
    arrays = [(np.array(m.losses), np.array(m.costs)) for m in matrices]
    low, high = 0.0, 1.0
    for _ in range(80):  # the total cost falls as the price rises
        price = (low + high) / 2
        spent = sum(costs[(losses + price * costs).argmin()] for losses, costs in arrays)
        low, high = (price, high) if spent > budget else (low, price)
    return float(sum((losses + high * costs).min() for losses, costs in arrays) - high * budget)
