from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from grasp_kernels import (
    Factors,
    lowrank_glu,
    lowrank_linear,
    lowrank_linear_grouped,
    lowrank_linear_merged,
    recording,
    singular_value_grad,
)
from grasp_kernels.quantized import pack_int4
from grasp_kernels.recording import RecordedCall, read_folder, recording_to
from grasp_kernels.reference import Dense
from grasp_kernels.shapes import parse_shape

X = torch.randn(2, 3, 24)
U, Vh = torch.randn(16, 4), torch.randn(4, 24)
PIVOTED = Factors(U[:12], None, Vh, order=torch.arange(16, dtype=torch.int32))
PLAIN = Factors(U, None, Vh)
LINEAR = RecordedCall("lowrank_linear", parse_shape("24x16r4"), (False,), 6, "float32", "cpu", False)


def test_every_op_is_recorded_on_every_path(tmp_path: Path) -> None:
    with recording_to(tmp_path):
        lowrank_linear(X, U, None, Vh)
        lowrank_linear(X, U.clone().requires_grad_(), None, Vh).sum().backward()
        lowrank_linear(X, U, None, Vh, backend="reference")
        with torch.autocast("cpu", torch.bfloat16):
            lowrank_linear(X, U, None, Vh)
        lowrank_linear_grouped(X, [PLAIN, PIVOTED])
        lowrank_linear_merged(X, [PLAIN, PIVOTED])
        lowrank_linear_merged(X, [PLAIN, Dense(torch.randn(8, 24))])
        lowrank_glu(X, PLAIN, PLAIN)
        singular_value_grad(X, torch.randn(2, 3, 16), U, Vh)
        lowrank_linear(X[:0], U, None, Vh)  # has no rows
    lowrank_linear(X, U, None, Vh)  # after the block
    pair = parse_shape("24x16r4+24x16r4")
    assert read_folder(tmp_path) == (
        1,
        {
            LINEAR: 4,
            LINEAR._replace(dtype="bfloat16"): 1,
            LINEAR._replace(op="lowrank_linear_grouped", shape=pair, pivoted=(False, True)): 2,
            LINEAR._replace(op="lowrank_glu", shape=pair, pivoted=(False, False)): 1,
            LINEAR._replace(op="singular_value_grad"): 1,
        },
    )


def test_a_compiled_call_counts_when_it_runs_and_not_when_it_is_traced(tmp_path: Path) -> None:
    function = torch.compile(lambda x: 2 * lowrank_linear(x, U, None, Vh), fullgraph=True, backend="aot_eager")
    with recording_to(tmp_path), torch.no_grad():
        for _ in range(3):
            function(X)
    assert read_folder(tmp_path) == (1, {LINEAR: 3})


def test_a_forked_process_counts_its_own_calls_and_they_survive_its_sudden_end(tmp_path: Path) -> None:
    with recording_to(tmp_path):
        lowrank_linear(X, U, None, Vh)
        if (child := os.fork()) == 0:
            recording.record("lowrank_linear", X[:1], [PLAIN])
            os.kill(os.getpid(), 9)
        os.waitpid(child, 0)
        lowrank_linear(X, U, None, Vh)
    assert read_folder(tmp_path) == (2, {LINEAR: 2, LINEAR._replace(rows=3): 1})


def test_more_different_calls_than_a_file_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "_SLOTS", 2)
    with recording_to(tmp_path):
        for rows in (1, 2, 3, 1, 3):
            lowrank_linear(X[0, :rows], U, None, Vh)
    assert len(list(tmp_path.iterdir())) == 2
    assert read_folder(tmp_path) == (1, {LINEAR._replace(rows=rows): count for rows, count in ((1, 2), (2, 1), (3, 2))})


def test_a_run_goes_on_when_its_calls_can_no_longer_be_written(tmp_path: Path) -> None:
    with recording_to(tmp_path / "gone"):
        with pytest.warns(RuntimeWarning, match="no longer recorded"):
            y = lowrank_linear(X, U, None, Vh)
        assert not recording.recorders
    torch.testing.assert_close(y, lowrank_linear(X, U, None, Vh))


def ints(rows: int, depth: int, group: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """An int8 matrix, or with groups one of int4."""
    scales = torch.ones(rows, 1 if group is None else -(-depth // group))
    stored = torch.ones(rows, depth, dtype=torch.int8)
    return stored if group is None else pack_int4(stored), scales


def test_quantised_calls_have_the_storage_of_each_linear(tmp_path: Path) -> None:
    x = torch.ones(1, 100)
    (U8, U8_scales), (Vh8, Vh8_scales) = ints(16, 4), ints(4, 100)
    (U4, U4_scales), (Vh4, Vh4_scales) = ints(16, 4, 32), ints(4, 100, 32)
    int8, int4 = (
        Factors(U8, None, Vh8, None, None, U8_scales, Vh8_scales),
        Factors(U4, None, Vh4, None, None, U4_scales, Vh4_scales),
    )
    floating = Factors(torch.ones(16, 4), None, torch.ones(4, 100))
    weight, weight_scales = ints(16, 100)
    order = torch.arange(16, dtype=torch.int32)
    dense = Factors(torch.empty(0, 16), None, weight, None, order, None, weight_scales)
    with recording_to(tmp_path):
        lowrank_linear_grouped(x, [int8, int4, floating])
        lowrank_linear(x, *dense)
        with pytest.warns(RuntimeWarning, match="U and Vh are stored in different ways"):
            lowrank_linear(x, *int8._replace(U=U4, U_scales=U4_scales))
    one = LINEAR._replace(rows=1)
    assert read_folder(tmp_path)[1] == {
        one._replace(
            op="lowrank_linear_grouped",
            shape=parse_shape("100x16r4+100x16r4+100x16r4"),
            pivoted=(False, False, False),
            weights=("int8", "int4/32", ""),
        ): 1,
        one._replace(shape=parse_shape("100x16r16"), pivoted=(True,), weights=("int8",)): 1,
    }
