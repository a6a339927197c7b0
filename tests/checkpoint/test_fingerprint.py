from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from torch import Tensor

from grasp.checkpoint.fingerprint import differences, request_fingerprint
from grasp.config import GraspConfig
from grasp.files import tensors_digest
from grasp.model.batch import CalibrationBatch
from tests.tiny_models import tiny_batches, tiny_model


def fingerprint(
    model: Any = None, tokens: Tensor | None = None, mask: Tensor | None = None, context: int = 0
) -> dict[str, Any]:
    batch = CalibrationBatch(tiny_batches(1)[0] if tokens is None else tokens, mask, context)
    return request_fingerprint(tiny_model("llama") if model is None else model, [batch], [], GraspConfig(num_layers=1))


def test_the_same_request_has_the_same_fingerprint_wherever_the_model_was_loaded_from(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert again.config.name_or_path != model.config.name_or_path
    assert differences(fingerprint(again), fingerprint(model)) == ""


def test_one_changed_weight_is_another_model() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-6
    assert differences(fingerprint(model), fingerprint()).startswith("model weights is ")


def test_an_offloaded_model_has_the_fingerprint_of_the_model() -> None:
    model = cpu_offload(tiny_model("llama"), torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert fingerprint(model)["model weights"] == fingerprint()["model weights"]
    assert model.model.layers[0].mlp.up_proj.weight.is_meta


@pytest.mark.parametrize(
    "changed",
    [
        {"tokens": tiny_batches(1)[0].flip(0)},
        {"tokens": tiny_batches(1)[0].reshape(4, 6)},
        {"mask": torch.ones(2, 12, dtype=torch.bool)},
        {"mask": torch.ones(2, 12, dtype=torch.bool).tril(8)},
        {"context": 3},
    ],
)
def test_other_tokens_shapes_masks_or_contexts_are_another_text(changed: dict[str, Any]) -> None:
    assert fingerprint(**changed)["calibration tokens"] != fingerprint()["calibration tokens"]


def test_differences_name_values_and_shorten_digests() -> None:
    got, expected = {"a": 1, "b": None, "c": "f" * 64, "d": [1]}, {"a": 1, "b": 0.5, "c": "e" * 64, "d": [1], "x": 2}
    assert (
        differences(got, expected) == "b is None, expected 0.5; c is ffffffff..., expected eeeeeeee...; x is None, "
        "expected 2"
    )
    assert differences(got, got) == ""


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.bool, torch.int64])
def test_digests_see_names_shapes_dtypes_and_values(dtype: torch.dtype) -> None:
    tensor = torch.tensor([[0, 1, 1], [1, 0, 0]]).to(dtype)
    other = [
        [("b", tensor)],
        [("a", tensor.flatten())],
        [("a", tensor.mT)],
        [("a", tensor.to(torch.float32))],
        [("a", tensor), ("a", tensor)],
        [("a", tensor[:0])],
        [("a", tensor[0, 0])],
        [],
    ]
    digests = {tensors_digest(named) for named in [*other, [("a", tensor)]]}
    assert len(digests) == len(other) + 1
    assert tensors_digest([("a", tensor.mT.contiguous().mT)]) == tensors_digest([("a", tensor)])
