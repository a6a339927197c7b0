from __future__ import annotations

import pytest

from grasp_kernels import roofline
from grasp_kernels.roofline import CARDS, Cost

# The rates of the published table of floors: a large copy and a large matmul on an H100.
SEEN = roofline.Card("seen", flops=800e12, bandwidth=3.0e12)
FLOORS = [  # in_features, out_features, rank, tokens → dense, two matmuls, fused, in µs
    (4096, 4096, 205, 1, 11.2, 1.13, 1.13),
    (4096, 4096, 205, 64, 11.5, 1.49, 1.47),
    (4096, 4096, 205, 256, 12.6, 2.59, 2.52),
    (4096, 4096, 205, 8192, 344, 48.1, 45.9),
    (4096, 11008, 298, 2048, 231, 24.4, 23.6),
    (4096, 11008, 298, 8192, 923, 92.2, 92.2),
    (4096, 1024, 82, 64, 3.0, 0.51, 0.50),
    (4096, 14336, 318, 2048, 301, 30.2, 30.0),
    (4096, 14336, 318, 8192, 1203, 120, 120),
]


@pytest.mark.parametrize("entry", FLOORS, ids=lambda entry: "x".join(map(str, entry[:4])))
def test_floors_are_those_of_the_published_table(entry: tuple[int, int, int, int, float, float, float]) -> None:
    K, N, R, M, *expected = entry
    costs = [
        roofline.dense_linear(M, N, K),
        roofline.dense_linear(M, R, K) + roofline.dense_linear(M, N, R),
        roofline.lowrank_linear(M, N, K, R),
    ]
    floors = [roofline.floor(SEEN, *cost) * 1e6 for cost in costs]
    assert floors == pytest.approx(expected, rel=0.01)


def test_bytes_and_flops_by_hand() -> None:
    # x (2, 3), U (5, 1), Vh (1, 3), y (2, 5): 6 + 5 + 3 + 10 elements.
    assert roofline.lowrank_linear(2, 5, 3, 1, itemsize=4) == (Cost(24 * 4, 2 * 2 * (3 + 5)),)
    # x (2, 3), grad_y (2, 5), U and Vh as above; three rows of one fp32.
    assert roofline.singular_value_grad(2, 5, 3, 1, outputs=3) == (Cost(24 * 2 + 3 * 4, 2 * 2 * (3 + 5)),)


def test_pivoted_factors_by_hand() -> None:
    # C (5 - 2, 2) and Vp (2, 3): 12 parameters, 4 fewer than U and Vh; x has 4 rows.
    (factored,) = roofline.lowrank_linear(4, 5, 3, 2)
    assert roofline.pivoted(factored, 4, [2]) == Cost((12 + 4 * 3 + 4 * 5) * 2, 2 * 4 * 12)


def test_a_group_reads_its_input_once() -> None:
    alone = roofline.lowrank_linear(16, 64, 32, 4)[0]
    (grouped,) = roofline.lowrank_linear_grouped(16, 32, [(64, 4), (64, 4), (64, 4)])
    assert grouped.flops == 3 * alone.flops
    assert grouped.bytes == 3 * alone.bytes - 2 * 16 * 32 * 2


def test_a_gated_unit_writes_one_width() -> None:
    (pair,) = roofline.lowrank_linear_grouped(16, 32, [(64, 4), (64, 6)])
    (unit,) = roofline.lowrank_glu(16, 64, 32, 4, 6)
    assert unit.flops == pair.flops
    assert unit.bytes == pair.bytes - 16 * 64 * 2


def test_each_launch_is_bound_by_its_bytes_or_its_flops() -> None:
    card = roofline.Card("round", flops=10.0, bandwidth=100.0)
    assert roofline.floor(card, Cost(bytes=100, flops=5)) == 1.0
    assert roofline.floor(card, Cost(bytes=100, flops=20)) == 2.0
    assert roofline.floor(card, Cost(bytes=100, flops=5), Cost(bytes=100, flops=20)) == 3.0
    assert roofline.floor(card) == 0


@pytest.mark.parametrize("rates", [(0, 1), (1, 0), (-1, 1)])
def test_a_measured_rate_must_be_positive(rates: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="must be positive"):
        roofline.Card("broken", flops=rates[0], bandwidth=rates[1])


def test_a_measured_card_is_below_its_data_sheet() -> None:
    sheet, seen = CARDS["H100"], CARDS["H100 measured"]
    assert seen.flops < sheet.flops
    assert seen.bandwidth < sheet.bandwidth


@pytest.mark.parametrize("name", CARDS)
def test_cards_are_in_plausible_units(name: str) -> None:
    card = CARDS[name]
    assert 1e14 < card.flops < 1e16
    assert 5e11 < card.bandwidth < 1e13
    assert 100 < card.flops / card.bandwidth < 500  # FLOP per byte at which both bind
