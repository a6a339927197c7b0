from __future__ import annotations

import doctest
import tracemalloc

from speedgate import measures
from speedgate.measures import python_blocks, python_peak_bytes


def test_the_examples_run() -> None:
    assert doctest.testmod(measures) == (0, 2)


def test_a_peak_counts_what_is_freed_during_the_call_and_nothing_before_it() -> None:
    kept = bytearray(10**6)
    assert 3 * 10**5 <= python_peak_bytes(lambda: (len(bytearray(3 * 10**5)), len(kept))) < 4 * 10**5
    assert not tracemalloc.is_tracing()


def test_blocks_that_a_call_leaves_behind_are_counted() -> None:
    cache: list[object] = []
    assert python_blocks(lambda: cache.extend(object() for _ in range(1000))) >= 1000
    assert python_blocks(lambda: [object() for _ in range(1000)].clear()) < 100
