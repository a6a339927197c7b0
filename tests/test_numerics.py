from __future__ import annotations

import math

import pytest
import torch

from tests.numerics import FLOORS, assert_accurate, inaccuracy, relative_error

exact = torch.tensor([3.0, 4.0], dtype=torch.float64)
plain = exact.float()


def test_error_is_relative_to_the_norm() -> None:
    assert relative_error(torch.tensor([3.0, 4.5]), exact) == pytest.approx(0.1)
    assert relative_error(exact, exact) == 0


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_is_infinitely_wrong(value: float) -> None:
    assert relative_error(torch.tensor([3.0, value]), exact) == math.inf
    assert inaccuracy("linear", torch.float32, torch.tensor([3.0, value]), plain, exact) is not None


def test_where_the_exact_result_is_zero_only_zero_will_do() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert relative_error(torch.zeros(2), zero) == 0
    assert relative_error(torch.tensor([0.0, 1e-30]), zero) == math.inf


def test_nothing_is_accurate() -> None:
    assert relative_error(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64)) == 0


@pytest.mark.parametrize(("kind", "dtype"), FLOORS)
def test_the_floor_decides_where_plain_torch_is_exact(kind: str, dtype: torch.dtype) -> None:
    floor = FLOORS[kind, dtype]
    assert inaccuracy(kind, dtype, exact * (1 + 0.9 * floor), exact, exact) is None
    assert "at most" in (inaccuracy(kind, dtype, exact * (1 + 1.1 * floor), exact, exact) or "")


def test_twice_plain_torchs_error_is_allowed_on_top() -> None:
    rough = exact * 1.01
    assert inaccuracy("linear", torch.float64, exact * 1.0199, rough, exact) is None
    assert inaccuracy("linear", torch.float64, exact * 1.0201, rough, exact) is not None


def test_shape_and_dtype_are_part_of_the_result() -> None:
    with pytest.raises(AssertionError, match=r"expected torch\.float32"):
        assert_accurate("linear", torch.float32, exact, plain, exact)
    with pytest.raises(AssertionError, match=r"\(1, 2\), expected .* \(2,\)"):
        assert_accurate("linear", torch.float32, plain[None], plain, exact)
