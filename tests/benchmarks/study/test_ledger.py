from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.study.ledger import Ledger


def spend(seconds: float) -> None:
    until = time.process_time() + seconds
    while time.process_time() < until:
        pass


def test_seconds_of_earlier_processes_and_of_reused_work_are_added(tmp_path: Path) -> None:
    file = tmp_path / "ledger.json"
    first = Ledger(file)
    spend(0.05)
    first.note("sweep", 1, 2, besides=100.0)
    assert 100.05 <= first.seconds < 101
    second = Ledger(file)  # as another process
    spend(0.05)
    second.note("sweep", 2, 2)
    assert 100.1 <= second.seconds < 101
    assert json.loads(file.read_text(encoding="utf-8"))["done"] == 2
    second.remove()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_the_peak_is_the_largest_of_all_processes(tmp_path: Path) -> None:
    size, peaks = 64 << 20, []
    for count in (2, 1):
        ledger = Ledger(tmp_path / "ledger.json")
        torch.ones(count * size, dtype=torch.uint8)
        ledger.note("sweep", 1, 1)
        assert ledger.peak_bytes is not None
        peaks.append(ledger.peak_bytes)
    assert 1.9 * size < peaks[0] < 2.5 * size
    assert peaks[1] == peaks[0]
