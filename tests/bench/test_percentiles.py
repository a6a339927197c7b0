from __future__ import annotations

import pytest

from grasp.bench.percentiles import Percentiles


def test_precision_is_the_farther_end_of_the_interval_over_the_median() -> None:
    found = Percentiles.of([0.001 * value for value in (8, 9, 10, 10, 11, 13)])
    assert found.p50_interval == pytest.approx((8, 13))
    assert found.precision == pytest.approx(0.3)
    assert Percentiles.of([0.001]).precision is None
