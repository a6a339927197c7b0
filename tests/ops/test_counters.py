from __future__ import annotations

import pytest
import torch

from grasp_kernels import counters as module
from grasp_kernels.counters import counters

CPU = torch.device("cpu")


def test_counters_start_at_zero() -> None:
    assert counters(CPU, 5).tolist() == [0] * 5


def test_captured_launches_never_share_counters(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = torch.zeros(3 * 32, dtype=torch.int32)
    monkeypatch.setattr(module, "_reserve", {0: [reserve]})
    for number in (1, 2):
        module._captured(CPU, 0, 20).fill_(number)
    assert reserve.reshape(3, 32).tolist() == [[1] * 32, [2] * 32, [0] * 32]
    outside = module._captured(CPU, 0, 40)  # more than the reserve has
    assert outside.tolist() == [0] * 40
    assert module._captured(CPU, 0, 20).untyped_storage().data_ptr() == reserve.untyped_storage().data_ptr()


def test_a_capture_before_any_call_gets_counters_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_reserve", {})
    assert module._captured(CPU, 0, 7).tolist() == [0] * 7
