from __future__ import annotations

import gc

import pytest

from grasp.compression.layer_cost import LiveBytes
from grasp.model.batch import as_batches
from grasp.model.targets import layer_targets
from grasp.statistics.sweep import capture_prefix, sweep
from tests.tiny_models import tiny_batches, tiny_model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_nothing_of_a_batch_outlives_its_sweep(family: str) -> None:
    model, batches = tiny_model(family), as_batches(tiny_batches())
    targets = layer_targets(model, 1)[0]
    prefix = capture_prefix(model, batches, [1])
    with LiveBytes() as live:
        sweep(prefix, targets, lambda call: None)
        gc.collect()
        assert live.peak > 0
        assert live.now == 0
