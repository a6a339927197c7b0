from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from grasp.bench import conditions
from speedgate.timing import using_threads


@pytest.fixture(autouse=True)
def cheap_conditions(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Conditions that cost nothing to measure, and the number of threads as it was."""
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    with using_threads(torch.get_num_threads()):
        yield
