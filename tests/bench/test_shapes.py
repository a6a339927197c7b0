from __future__ import annotations

from pathlib import Path

import pytest

from grasp.bench.shapes import WELL_KNOWN, model_calls
from grasp.bench.workloads import DOWN, GATE_UP, GROUPED_QUERY_QKV, QKV, SMALL_MLP, WIDE_MLP
from grasp.builtin import BUILTIN
from grasp.errors import ModelNotFoundError
from grasp_kernels.shapes import format_shape
from tests.tiny_models import tiny_model


def calls(name: str, retain_ratio: float = 0.1) -> set[tuple[str, str]]:
    return {(op, format_shape(shape)) for op, shape in model_calls(name, retain_ratio)}


def test_a_well_known_model_gives_the_calls_of_its_layer() -> None:
    singles = {"4096x4096r204", "4096x1024r81", "4096x14336r318", "14336x4096r318"}
    assert calls("llama-3.1-8b") == {
        *(("lowrank_linear", shape) for shape in singles),
        *(("singular_value_grad", shape) for shape in singles),
        ("lowrank_linear_grouped", "4096x4096r204+4096x1024r81+4096x1024r81"),
        ("lowrank_linear_grouped", "4096x14336r318+4096x14336r318"),
        ("lowrank_glu", "4096x14336r318+4096x14336r318"),
    }


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama-2-7b", {QKV, GATE_UP, DOWN}),
        ("llama-3.1-8b", {GROUPED_QUERY_QKV, WIDE_MLP}),
        ("smollm2-135m", {SMALL_MLP}),
    ],
)
def test_the_named_shapes_are_of_well_known_models(name: str, expected: set[str]) -> None:
    assert expected <= {shape for _, shape in calls(name)}


def test_the_table_says_of_the_builtin_model_what_its_configuration_says() -> None:
    assert calls("smollm2-135m", 0.3) == calls(BUILTIN, 0.3)


@pytest.mark.parametrize("name", WELL_KNOWN)
def test_every_well_known_model_has_every_op(name: str) -> None:
    assert len({op for op, _ in calls(name)}) == 4


def test_other_families_have_what_their_layers_have(tmp_path: Path) -> None:
    tiny_model("gpt2").config.save_pretrained(tmp_path)
    assert calls(str(tmp_path), 0.5) == {
        (op, shape)
        for op in ("lowrank_linear", "singular_value_grad")
        for shape in ("32x96r12", "32x32r8", "32x128r12", "128x32r12")
    }


def test_a_model_that_is_not_there_is_answered_with_those_that_are_known() -> None:
    with pytest.raises(ModelNotFoundError, match=r"llama-2-7b, .*gemma-3-270m"):
        model_calls("./absent", 0.1)


@pytest.mark.parametrize("ratio", [0.0, 1.5])
def test_an_impossible_ratio_is_refused(ratio: float) -> None:
    with pytest.raises(ValueError, match=f"retain_ratio must be above 0 and at most 1, got {ratio}"):
        model_calls("llama-2-7b", ratio)
