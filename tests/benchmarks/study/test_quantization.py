from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.study import quantization
from benchmarks.study.records import STUDY_RECORDS, StudyQuantized, excess_by_bytes
from grasp.bench.decoding import difference
from grasp.bench.results import read_results
from grasp.bench.yardstick import load_llama_cpp
from tests.command_line import run_script
from tests.tiny_models import tiny_model

MEASURED = {("dense", "bf16"): (200, 10.0), ("dense", "int8"): (104, 10.1), ("small", "int8"): (80, 12.0)}


def test_cells_are_compared_with_the_dense_model_and_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []

    def measure(source: str, way: str, *_: object) -> tuple[int, float, float]:
        calls.append((source, way))
        return *MEASURED.get((source, way), (180, 11.0)), 1.5

    monkeypatch.setattr(quantization, "measure", measure)
    output = tmp_path / "q.jsonl"
    arguments = ["dense", "small", "-o", str(output), "--ways", "bf16", "--ways", "int8"]
    result = run_script(quantization.main, *arguments)
    assert result.exit_code == 0, result.output
    assert calls == [("dense", "bf16"), ("dense", "int8"), ("small", "bf16"), ("small", "int8")]
    cells = {(c.model, c.way): c for c in read_results(output, STUDY_RECORDS) if isinstance(c, StudyQuantized)}
    assert cells["small", "int8"].of_dense == 0.4
    assert cells["small", "int8"].excess == pytest.approx(math.log(1.2))
    calls.clear()
    run_script(quantization.main, *arguments)
    assert not calls
    (picture,) = excess_by_bytes(list(cells.values()))
    (axes,) = picture.draw().axes
    assert axes.get_title(loc="left") == "dense"
    assert {"int8", "compressed, int8", "Pareto front"} <= {line.get_label() for line in axes.lines}


def test_without_the_dense_model_there_is_nothing_to_compare_with(tmp_path: Path) -> None:
    result = run_script(quantization.main, "dense", "-o", str(tmp_path / "q"), "--ways", "int8")
    assert result.exit_code == 2
    assert "with bf16 too" in result.output.replace("\n", " ")


def test_models_of_one_name_are_refused(tmp_path: Path) -> None:
    result = run_script(quantization.main, "dense", "a/small", "b/small", "-o", str(tmp_path / "q"))
    assert result.exit_code == 2
    assert "two models have the same last part" in " ".join(result.output.replace("│", " ").split())


def test_what_is_called_gguf_needs_llama_cpp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    monkeypatch.setattr(quantization, "measure", lambda *_: pytest.fail("measured before the package was looked for"))
    result = run_script(quantization.main, "dense", "-o", str(tmp_path / "q"))
    assert result.exit_code == 2
    assert "pip install llama-cpp-python" in " ".join(result.output.split())


def test_llama_cpp_rounds_the_weights_and_computes_the_logits() -> None:
    pytest.importorskip("llama_cpp")
    model, tokens = tiny_model("llama"), torch.arange(40).view(2, 20)
    expected = model(tokens).logits
    with torch.no_grad(), quantization.in_llama_cpp(model, "tiny", "Q8_0") as size:
        assert 0 < size < sum(4 * parameter.numel() for parameter in model.parameters())
        assert 1e-4 < difference(model(input_ids=tokens).logits, expected) < 5e-2
    assert torch.equal(model(tokens).logits, expected)
