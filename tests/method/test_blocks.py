from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from grasp.method import blocks
from grasp.method.blocks import fp64_device, quadratic_form, row_blocks, to_double


def test_rows_are_divided_into_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 4)
    assert row_blocks(9) == [slice(0, 4), slice(4, 8), slice(8, 9)]
    assert row_blocks(0) == []


@pytest.mark.parametrize("rows", [1, 4, 512])
def test_a_quadratic_form_reads_the_lower_triangle_alone(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK_ROWS", rows)
    lower = torch.randn(9, 9).tril()
    C, X = (lower + lower.tril(-1).mT).double(), torch.randn(9, 6, dtype=torch.float64)
    spoiled = lower + torch.full((9, 9), float("nan")).triu(1)
    expected = X.mT @ (C + 0.5 * torch.eye(9, dtype=torch.float64)) @ X
    torch.testing.assert_close(quadratic_form(spoiled, X, 0.5), expected)


def test_a_copy_in_fp64_never_shares_memory() -> None:
    x = torch.ones(3, dtype=torch.float64)
    assert to_double(x, x.device).data_ptr() == x.data_ptr()
    assert to_double(x, x.device, copy=True).data_ptr() != x.data_ptr()


@pytest.mark.parametrize(
    ("device", "expected"), [("cpu", "cpu"), ("cuda:1", "cuda:1"), ("mps", "cpu"), ("xpu:0", "cpu"), ("xpu:1", "xpu:1")]
)
def test_devices_without_fp64_work_on_the_cpu(device: str, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda xpu: SimpleNamespace(has_fp64=xpu.index == 1))
    assert fp64_device(torch.device(device)) == torch.device(expected)
