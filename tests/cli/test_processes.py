from __future__ import annotations

import pytest
import torch

from grasp.cli.processes import started_together
from grasp.errors import DistributedError


def test_a_launcher_that_does_not_number_the_processes_of_a_machine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setattr("grasp.loading.find_device", torch.device)
    with pytest.raises(DistributedError, match="LOCAL_RANK is not set; start the processes with torchrun"):
        started_together("cuda").__enter__()


def test_a_number_of_processes_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "abc")
    with pytest.raises(DistributedError, match="WORLD_SIZE is 'abc'; expected the number of processes"):
        started_together(None).__enter__()
