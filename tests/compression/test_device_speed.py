from __future__ import annotations

import math

import torch

from grasp.compression.device_speed import decomposition_notice, measure_rates, svd_flops


def test_rates_are_measured_on_the_device() -> None:
    rates = measure_rates((96, 64), 32, dtype=torch.bfloat16, device=torch.device("cpu"))
    assert all(math.isfinite(rate) and rate > 0 for rate in (rates.sweeps, rates.statistics, rates.svd))


def test_a_decomposition_costs_the_same_of_a_matrix_and_its_transpose() -> None:
    assert svd_flops((3, 2)) == svd_flops((2, 3)) == 6 * 3 * 4 + 20 * 8


def test_decompositions_on_another_device_are_announced() -> None:
    assert decomposition_notice(torch.device("cuda")) is None
    assert decomposition_notice(torch.device("mps")) == "mps has no fp64: weights are decomposed on the CPU"
