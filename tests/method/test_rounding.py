from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from grasp.method import rounding
from grasp.method.rounding import Rounded, round_nearest, round_to_outputs, rounding_bytes
from grasp.method.storage import FP8, Storage
from tests.method.resources import peaks_of


def inputs(depth: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4 * depth, depth, generator=generator) @ torch.randn(depth, depth, generator=generator)
    return mixed * torch.logspace(-1, 1, depth)


def weights(rows: int, depth: int) -> Tensor:
    return torch.randn(rows, depth, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("bits", "group"), [(8, None), (4, None), (4, 32), (4, 64)])
def test_no_entry_is_off_by_more_than_half_a_step_or_what_is_clipped(bits: int, group: int | None) -> None:
    weight = weights(6, 137)
    rounded = round_nearest(weight, Storage(bits, group))
    assert rounded.scales.shape == (6, 1 if group is None else -(-137 // group))
    assert torch.equal(rounded.scales, rounded.scales.bfloat16().float())
    lowest = -(2 ** (bits - 1))
    assert rounded.values.min() >= lowest
    assert rounded.values.max() <= -lowest - 1
    steps = rounded.scales.abs() if group is None else rounded.scales.abs().repeat_interleave(group, 1)[:, :137]
    inside = (rounded.values > lowest) & (rounded.values < -lowest - 1)
    assert ((rounded.matrix - weight).abs()[inside] <= steps.expand_as(weight)[inside] / 2 * 1.0001).all()


def test_fp8_values_are_the_nearest_and_the_largest_is_448() -> None:
    weight = weights(6, 137)
    rounded = round_nearest(weight, FP8)
    assert rounded.values.dtype == torch.float8_e4m3fn
    assert rounded.values.float().abs().amax(1).tolist() == [448] * 6
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    every = every[every.isfinite()]
    ratio = (weight / rounded.scales).clamp(-448, 448)
    nearest = (ratio[..., None] - every).abs().amin(-1)
    torch.testing.assert_close((ratio - rounded.values.float()).abs(), nearest)


@pytest.mark.parametrize("storage", [Storage(8), FP8, Storage(4), Storage(4, 32), Storage(4, 64)], ids=str)
def test_outputs_change_less_than_with_the_nearest_values(storage: Storage) -> None:
    x, weight = inputs(150), weights(40, 150)

    def change(rounded: Rounded) -> float:
        return float((x @ (weight - rounded.matrix).mT).norm())

    assert change(round_to_outputs(weight, x.mT @ x, storage)) < 0.8 * change(round_nearest(weight, storage))


def test_two_columns_are_rounded_as_the_definition_says() -> None:
    """The first column to the nearest value; the second makes up for its error, which the inputs share."""
    moment = torch.tensor([[2.0, 1.0], [1.0, 1.5]])
    weight = torch.tensor([[0.31, -1.0], [0.77, 1.27]])
    rounded = round_to_outputs(weight, moment, Storage(8))
    damped = moment + 0.05 * moment.diagonal().mean() * torch.eye(2)
    scales = rounded.scales[:, 0]
    first = (weight[:, 0] / scales).round()
    error = weight[:, 0] - first * scales
    second = ((weight[:, 1] + error * damped[0, 1] / damped[1, 1]) / scales).round().clamp(-128, 127)
    assert torch.equal(rounded.values, torch.stack([first, second], 1).to(torch.int8))


def test_rows_make_up_for_the_errors_of_other_rows_that_reach_the_same_outputs() -> None:
    x, weight = inputs(96), weights(80, 96)
    mixing = torch.randn(60, 80, generator=torch.Generator().manual_seed(2))

    def change(rounded: Rounded) -> float:
        return float((x @ (weight - rounded.matrix).mT @ mixing.mT).norm())

    alone, together = (
        round_to_outputs(weight, x.mT @ x, Storage(4, 32), metric=metric) for metric in (None, mixing.mT @ mixing)
    )
    assert change(together) < 0.8 * change(alone)
    assert torch.equal(round_to_outputs(weight, x.mT @ x, Storage(4, 32), metric=torch.eye(80)).values, alone.values)


@pytest.mark.parametrize("storage", [Storage(8), FP8, Storage(4)], ids=str)
def test_zero_rows_and_dead_inputs_are_legal(storage: Storage) -> None:
    weight, moment = weights(4, 70), torch.zeros(70, 70)
    weight[1] = 0
    for rounded in (round_to_outputs(weight, moment, storage), round_nearest(weight, storage)):
        assert (rounded.matrix[1] == 0).all()
        assert rounded.matrix.isfinite().all()


def test_an_entry_of_largest_magnitude_and_either_sign_is_exact_without_clipping() -> None:
    for sign, entry in itertools.product((-1, 1), (0, 3)):
        weight = torch.zeros(1, 8)
        weight[0, entry] = sign * 4.0
        assert torch.equal(round_nearest(weight, Storage(4)).matrix, weight)


def test_the_peaks_are_within_the_estimates() -> None:
    cases = [("rounding", shape, 1) for shape in ((600, 1600), (1600, 600))]
    for (_, shape, _), measured in zip(cases, peaks_of(cases), strict=True):
        assert 0.5 * rounding_bytes(shape) < measured < rounding_bytes(shape)


def test_scales_do_not_depend_on_how_many_are_chosen_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(9, 100)
    at_once = round_nearest(weight, Storage(4, 32))
    monkeypatch.setattr(rounding, "_ENTRIES", 2 * 128)  # two rows, padded to whole groups
    assert all(torch.equal(*each) for each in zip(at_once, round_nearest(weight, Storage(4, 32)), strict=True))
