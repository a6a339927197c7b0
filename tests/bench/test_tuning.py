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


def test_every_shape_is_tuned_in_both_forms_at_every_row_count_and_pairs_as_gated_units_too(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    files = tuning.tune(["32x16r3", "32x48r5+32x48r4"], [1, 4], dtype="float16", output=tmp_path)
    kernels = ["lowrank_linear", "lowrank_glu", "singular_value_grad"]
    assert files == [tmp_path / f"{kernel}.json" for kernel in kernels]
    pair, single = (
        [autotune.Workload(rows, 32, members, torch.float16, pivoted) for rows in (1, 4) for pivoted in (False, True)]
        for members in (((48, 5), (48, 4)), ((16, 3),))
    )
    assert tuned[:2] == [("lowrank_linear", single + pair, tmp_path), ("lowrank_glu", pair, tmp_path)]


def test_a_linear_of_full_rank_has_no_pivoted_form(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    tuning.tune(["32x16r16"], [1], output=tmp_path)
    assert [workload.pivoted for workload in tuned[0][1]] == [False]


def test_linears_of_unequal_width_are_no_gated_unit(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    tuning.tune(["32x48r5+32x16r4"], [1], output=tmp_path)
    assert [kernel for kernel, _, _ in tuned] == ["lowrank_linear", "singular_value_grad"]


def test_the_gradient_is_tuned_once_for_each_rank_and_full_rank_at_the_tokens_of_a_calibration(
    tuned: list[tuple[str, list[autotune.Workload], Path]], tmp_path: Path
) -> None:
    tuning.tune(["32x16r3", "32x48r5+32x48r3"], [1], output=tmp_path)
    (kernel, workloads, _) = tuned[-1]
    assert kernel == "singular_value_grad"
    assert {workload.rows for workload in workloads} == set(tuning.GRADIENT_TOKENS)
    assert sorted(R for ((_, R),) in {workload.members for workload in workloads}) == [3, 5, 16, 32]
    assert len(workloads) == 4 * len(tuning.GRADIENT_TOKENS)


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(GraspError, match="CUDA GPU"):
        tuning.tune(tuning.SHAPES, [1])


def test_bad_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="is not KxNrR"):
        tuning.tune(["32by16"], [1])
    with pytest.raises(ValueError, match=r"dtype must be one of .* got 'int8'"):
        tuning.tune(tuning.SHAPES, [1], dtype="int8")
