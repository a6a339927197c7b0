from __future__ import annotations

import gc

import torch
from torch import Tensor

from grasp_kernels.versions import PerVersion


def test_a_value_is_computed_once_per_version_of_a_tensor() -> None:
    computed: list[Tensor] = []
    total = PerVersion(lambda tensor: (computed.append(tensor.clone()), float(tensor.sum()))[1])
    tensor = torch.ones(3)
    assert [total(tensor) for _ in range(3)] == [3.0] * 3
    assert len(computed) == 1
    tensor[0] = 5
    assert [total(tensor) for _ in range(3)] == [7.0] * 3
    assert total(tensor.clone()) == 7.0
    assert len(computed) == 3


def test_tensors_of_inference_mode_count_no_changes_so_nothing_is_kept() -> None:
    total = PerVersion(lambda tensor: float(tensor.sum()))
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert total(tensor) == 3.0
        tensor[0] = 5
        assert total(tensor) == 7.0


def test_a_value_of_such_a_tensor_is_kept_on_request() -> None:
    total = PerVersion(lambda tensor: float(tensor.sum()), uncounted=True)
    with torch.inference_mode():
        tensor = torch.ones(3)
        assert total(tensor) == 3.0
        tensor[0] = 5
        assert total(tensor) == 3.0
        assert total(tensor.clone()) == 7.0


def test_a_value_is_freed_with_its_tensor() -> None:
    copies = PerVersion(torch.clone)
    tensor = torch.ones(3)
    copies(tensor)
    assert len(copies._values) == 1
    del tensor
    gc.collect()
    assert len(copies._values) == 0
