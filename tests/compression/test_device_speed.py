from __future__ import annotations

import math

import pytest
import torch

from grasp.compression.device_speed import card_rates, decomposition_notice, measure_rates
from grasp.method.basis import BASES
from grasp_kernels.roofline import CARDS


@pytest.mark.parametrize("basis", BASES.values(), ids=BASES)
def test_rates_are_measured_on_the_device(basis: object) -> None:
    rates = measure_rates((96, 64), 32, dtype=torch.bfloat16, device=torch.device("cpu"), basis=basis)
    assert all(math.isfinite(rate) and rate > 0 for rate in (rates.sweeps, rates.statistics, rates.svd))


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_card_has_rates_in_all_dtypes(card: object) -> None:
    narrow, single, double = (
        card_rates(card, 2**20, dtype=dtype, basis=BASES["kfac"])
        for dtype in (torch.bfloat16, torch.float32, torch.float64)
    )
    assert narrow.sweeps > single.sweeps >= double.sweeps
    assert narrow.svd == single.svd == double.sweeps


def test_few_tokens_wait_for_the_weights_to_be_read() -> None:
    card, plain = CARDS["H100"], BASES["plain"]
    one = card_rates(card, 1, dtype=torch.bfloat16, basis=plain)
    assert one.sweeps == card.bandwidth  # a multiply and an add for each weight, of two bytes
    assert one.statistics == card.flops
    assert one.svd == card.fp32


def test_decompositions_on_another_device_are_announced() -> None:
    assert decomposition_notice(torch.device("cuda")) is None
    assert decomposition_notice(torch.device("mps")) == "mps has no fp64: weights are decomposed on the CPU"
