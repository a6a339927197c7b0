from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from grasp_kernels import cuda
from speedgate.timing import using_threads
from tests.ops.cuda_emulator import STREAM, Emulator, build


@pytest.fixture
def two_threads() -> Iterator[None]:
    with using_threads(2):
        yield


@pytest.fixture(scope="session")
def built_emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    return Emulator(build(tmp_path_factory.mktemp("cuda_on_host")))


@pytest.fixture
def emulator(built_emulator: Emulator, monkeypatch: pytest.MonkeyPatch) -> Iterator[Emulator]:
    """The emulated module in place of the real one. Memory for h is NaN, and memory after it must stay NaN."""
    behind: list[Tensor] = []

    def workspace(device: torch.device, size: int) -> tuple[int, Tensor]:
        nans = torch.full((size // 4 + (1 << 16),), torch.nan)
        start = -nans.data_ptr() % 16
        behind.append(nans[(start + size) // 4 :])
        return STREAM, nans.view(torch.uint8)[start : start + size]

    monkeypatch.setattr(cuda, "_module", lambda: built_emulator)
    monkeypatch.setattr(cuda, "_workspace", workspace)
    monkeypatch.setattr(cuda, "counters", lambda *_: built_emulator.barrier)
    for cached in (cuda._load_kernels, cuda._workspace_bytes):
        cached.cache_clear()
    built_emulator.configure()
    built_emulator.barrier.zero_()
    yield built_emulator
    assert all(rest.isnan().all() for rest in behind)
    for cached in (cuda._load_kernels, cuda._workspace_bytes):
        cached.cache_clear()
