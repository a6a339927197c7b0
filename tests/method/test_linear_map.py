from __future__ import annotations

import torch

from grasp.method.linear_map import linear_map


def test_the_map_is_the_least_squares_solution() -> None:
    y, z = torch.randn(80, 6, dtype=torch.float64), torch.randn(80, 6, dtype=torch.float64)
    y *= 1e3
    T = linear_map(y.mT @ y, z.mT @ y)
    torch.testing.assert_close(T, torch.linalg.lstsq(y, z).solution.mT, rtol=0, atol=2e-3)


def test_the_map_of_nothing_is_the_identity() -> None:
    y = torch.randn(80, 6, dtype=torch.float64)
    torch.testing.assert_close(linear_map(y.mT @ y, y.mT @ y), torch.eye(6, dtype=torch.float64))
