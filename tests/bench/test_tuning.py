from __future__ import annotations

from pathlib import Path

import pytest
import torch

from grasp.bench import tuning
from grasp.errors import GraspError
from grasp_kernels import autotune


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, list[autotune.Workload], Path]]:
    calls: list[tuple[str, list[autotune.Workload], Path]] = []

    def record(kernel: str, workloads: list[autotune.Workload], *, directory: Path) -> Path:
        calls.append((kernel, workloads, directory))
        return directory / f"{kernel}.json"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(autotune, "tune", record)
    return calls


def test_every_shape_is_tuned_at_every_row_count_and_pairs_as_gated_units_too(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    files = tuning.tune(["32x16r3", "32x48r5+32x48r4"], [1, 4], dtype="float16", output=tmp_path)
    assert files == [tmp_path / "lowrank_linear.json", tmp_path / "lowrank_glu.json"]
    pair = [autotune.Workload(rows, 32, ((48, 5), (48, 4)), torch.float16) for rows in (1, 4)]
    single = [autotune.Workload(rows, 32, ((16, 3),), torch.float16) for rows in (1, 4)]
    assert tuned == [("lowrank_linear", single + pair, tmp_path), ("lowrank_glu", pair, tmp_path)]


def test_linears_of_unequal_width_are_no_gated_unit(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    tuning.tune(["32x48r5+32x16r4"], [1], output=tmp_path)
    assert [kernel for kernel, _, _ in tuned] == ["lowrank_linear"]


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraspError, match="CUDA GPU"):
        tuning.tune(tuning.SHAPES, [1])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="is not KxNrR"):
        tuning.tune(["32by16"], [1])
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        tuning.tune(tuning.SHAPES, [1], dtype="int8")
