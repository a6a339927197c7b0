from __future__ import annotations

import gc

import pytest
import torch

from grasp.compression.layer_cost import LiveBytes
from grasp.model.batch import as_batches
from grasp.model.targets import layer_targets
from grasp.statistics.sweep import capture_prefix, propagate, sum_divergences, sweep
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


def test_divergences_are_those_of_each_student_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", torch.float64)
    prefix = capture_prefix(model, as_batches(tiny_batches(3)), {0})
    outputs = [propagate(prefix, range(depth), prefix.hidden[0]) for depth in (3, 2, 1)]
    students = [*outputs, outputs[1], outputs[2]]
    monkeypatch.setattr("grasp.statistics.sweep.STUDENTS", 2)
    done: list[int] = []
    together = sum_divergences(prefix, students, outputs[0], done.append)
    assert together == [sum_divergences(prefix, [student], outputs[0])[0] for student in students]
    assert together[0] == 0 < together[1] != together[2] > 0
    assert done == [2, 4, 5]
