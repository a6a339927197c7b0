from __future__ import annotations

import sys

import pytest
import torch

from grasp.bench.memory import peak_bytes_above_now


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own count")
def test_what_a_call_holds_for_a_moment_is_seen() -> None:
    size = 64 << 20

    def call(count: int) -> None:
        torch.ones(count * size, dtype=torch.uint8)

    once, twice = peak_bytes_above_now(lambda: call(1)), peak_bytes_above_now(lambda: call(2))
    assert once is not None
    assert twice is not None
    assert 0.9 * size < once < 1.5 * size  # the kernel counts a thread's pages with some delay
    assert 1.9 * size < twice < 2.5 * size
