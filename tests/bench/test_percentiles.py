from __future__ import annotations

import random
from statistics import NormalDist

import pytest

from grasp.bench.percentiles import Percentiles, quantile_interval


def test_an_interval_needs_enough_times() -> None:
    for fraction, fewest in ((0.5, 6), (0.9, 36), (0.95, 72), (0.99, 368)):
        values = list(map(float, range(fewest)))
        assert quantile_interval(values[1:], fraction) is None
        low, high = quantile_interval(values, fraction) or (0, 0)
        assert low < fraction * fewest < high == fewest - 1


def test_an_interval_covers_the_quantile_as_often_as_it_says() -> None:
    numbers, covered = random.Random(0), 0
    for _ in range(400):
        low, high = quantile_interval([numbers.gauss() for _ in range(100)], 0.9) or (0, 0)
        covered += low <= NormalDist().inv_cdf(0.9) <= high
    assert 0.93 < covered / 400 < 0.99


def test_precision_is_the_farther_end_of_the_interval_over_the_median() -> None:
    found = Percentiles.of([0.001 * value for value in (8, 9, 10, 10, 11, 13)])
    assert found.p50_interval == pytest.approx((8, 13))
    assert found.precision == pytest.approx(0.3)
    assert Percentiles.of([0.001]).precision is None


def test_an_interval_of_thousands_of_times_is_narrow() -> None:
    low, high = quantile_interval(list(map(float, range(5000))), 0.5) or (0, 0)
    assert 2420 < low < 2440
    assert 2560 < high < 2580
