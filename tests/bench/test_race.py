from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from grasp.bench.race import Laps, compare, race
from grasp.compression.layer_cost import FLOP_FORMULAS
from grasp.method.schedules import plan_sweeps
from grasp.model.batch import CalibrationBatch
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from tests.tiny_models import tiny_batches, tiny_model


@pytest.mark.parametrize(
    ("kept", "swaps", "gap"),
    [
        ([0, 1, 2], 0, 0.0),
        ([0, 1, 3], 1, 0.25),  # 3 instead of 2: 4.0 against 3.0
        ([0, 3, 4], 2, 1.75),  # 8.0 lost, 1.0 gained, the last one kept has 4.0
    ],
)
def test_swaps_are_measured_by_the_importance_they_lose(kept: list[int], swaps: int, gap: float) -> None:
    importance = torch.tensor([9.0, 8.0, 4.0, 3.0, 1.0])
    assert compare(torch.tensor(kept), importance) == (swaps, gap)


def test_a_sample_is_extrapolated_by_its_median_without_the_first_batch() -> None:
    laps = Laps([[9.0, 1.0, 3.0, 2.0], [5.0, 1.0, 1.0, 1.0]])
    assert laps.total(10) == 10 * (2.0 + 1.0)
    assert laps.total(4) == 4 * (2.0 + 1.0)
    assert Laps([[9.0, 1.0, 1.0, 4.0]]).total(5) == 1.0 + 1.0 + 4.0 + 2 * 1.0
    assert laps.spread == 1.0


@pytest.mark.parametrize("schedule", ["sequential", "per-layer", "single-sweep"])
def test_both_sides_end_with_the_same_model(schedule: str) -> None:
    model = tiny_model("llama", torch.float64)
    ours, naive = copy.deepcopy(model), copy.deepcopy(model)
    targets = [target for layer in (0, 2) for target in layer_targets(ours, layer)[0]]
    sweeps, batches = plan_sweeps(targets, schedule), [CalibrationBatch(tokens) for tokens in tiny_batches(2)]
    result = race(ours, naive, batches, sweeps, 0.4, tokens=10**6)
    assert (result.swaps, result.largest_gap) == (0, 0.0)
    assert result.contraction_seconds > 0  # so many tokens are summed as gradients of weights
    assert len(result.grasp.sweeps) == len(result.naive.sweeps) == len(sweeps)
    assert {len(laps) for laps in (*result.grasp.sweeps, *result.naive.sweeps, *result.prefix.sweeps)} == {2}
    low_rank = {name for name, module in ours.named_modules() if isinstance(module, LowRankLinear)}
    assert low_rank == {target.name for target in targets}
    tokens = tiny_batches(1, seed=5)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens).logits, naive(tokens).logits, rtol=0, atol=1e-9)
        assert not torch.allclose(ours(tokens).logits, model(tokens).logits)


def test_naive_flops_are_those_of_whole_passes_and_of_weights_built_anew() -> None:
    model = tiny_model("llama")
    ours, naive = copy.deepcopy(model), copy.deepcopy(model)
    targets = [target for target in layer_targets(ours, 2)[0] if target.block == "mlp"]
    batches = [CalibrationBatch(tokens) for tokens in tiny_batches(2, batch_size=1)]
    result = race(ours, naive, batches, [targets], 0.4, tokens=1)
    assert result.contraction_seconds == 0
    counted = result.naive_flops
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=FLOP_FORMULAS) as forward:
        model(batches[0].input_ids)
    rows, vocabulary, wide, narrow = 12, 97, 48, 32
    matrix = 2 * wide * narrow
    rebuilt = 3 * matrix * narrow * 2  # W from its factors, and the gradient in U diag(s)
    backward = 2 * rows * narrow * vocabulary + rows * matrix + 3 * rows * matrix  # head, down in its input, all in W
    assert counted == forward.get_total_flops() + rebuilt + backward
