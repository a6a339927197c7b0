from __future__ import annotations

import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from grasp.bench import model as bench_model
from grasp.bench import yardstick
from grasp.bench.decoding import Case
from grasp.bench.records import ModelResult, NotMeasured
from grasp.bench.results import read_results
from grasp.bench.schema import case_text
from grasp.bench.yardstick import Agreement
from grasp.errors import GraspError
from grasp.evaluation.generation import GenerationTime
from tests.command_line import RunMain
from tests.tiny_models import tiny_model

SIZES = ("--layers", "1", "--retain-ratio", "0.4", "--batch-size", "1", "--prompt-tokens", "8", "--new-tokens", "3")
SIZES = (*SIZES, "--backend", "reference", "--windows", "0", "--repeats", "2", "--threads", "1", "--device", "cpu")


def test_a_yardstick_that_cannot_be_run_is_one_clear_line(
    bench: RunMain, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    yardstick.load_llama_cpp.cache_clear()
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    outcome = bench("model", tiny, *SIZES, "--yardstick", "llama.cpp")
    assert outcome.code == 2
    assert "pip install llama-cpp-python" in outcome.err
    outcome = bench("model", tiny, *SIZES, "--yardstick", "absent.gguf")
    assert outcome.code == 2
    assert "a yardstick is llama.cpp or a GGUF file, got 'absent.gguf'" in outcome.err
    for name in ("a", "b"):
        (tiny / name).mkdir()
        (tiny / name / "q4.gguf").touch()
    outcome = bench("model", tiny, *SIZES, "--yardstick", tiny / "a/q4.gguf", "--yardstick", tiny / "b/q4.gguf")
    assert outcome.code == 2
    assert "yardsticks need different names to be told apart; got q4.gguf, q4.gguf" in outcome.err


class Clock:
    """A yardstick of given times and agreement."""

    device = torch.device("cpu")
    tolerance, load_s, parameters, weight_bytes, about = 0.1, 2.0, 7, 14, "llama-cpp-python 1.0"

    def __init__(self, name: str, apart: float) -> None:
        self.name, self._apart = name, apart

    def prepare(self, case: Case) -> None:
        if self._apart == 7:
            raise GraspError("no room for 3 sequences")

    def agreement(self, case: Case) -> Agreement:
        return Agreement(self._apart, 3, case.new_tokens + 1)

    def generate(self, case: Case) -> GenerationTime:
        return GenerationTime(0.5, 0.75, (0.25,) * case.new_tokens, 11)


def test_yardsticks_are_rows_beside_the_models_unless_they_are_another_model(
    bench: RunMain, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def clocks(*_: object):  # type: ignore[no-untyped-def]
        yield [Clock("llama.cpp, F16", 0.01), Clock("llama.cpp, other.gguf", 0.9), Clock("llama.cpp, small.gguf", 7)]

    monkeypatch.setattr(bench_model, "require_yardsticks", lambda names: None)
    monkeypatch.setattr(bench_model, "yardsticks", clocks)
    outcome = bench("model", tiny, *SIZES, "--yardstick", "llama.cpp", "-o", tmp_path / "model.jsonl")
    assert outcome.code == 1
    assert "WRONG: llama.cpp, other.gguf at batch 1: logits are off by 9.0e-01, expected at most 1e-01" in outcome.text
    records = read_results(tmp_path / "model.jsonl")
    reasons = {record.provider: record.not_measured for record in records if isinstance(record, NotMeasured)}
    assert "llama.cpp, other.gguf" in reasons
    assert reasons["llama.cpp, small.gguf"] == "no room for 3 sequences"
    rows = {record.provider: record for record in records if isinstance(record, ModelResult)}
    assert list(rows)[-1] == "llama.cpp, F16"
    row = rows["llama.cpp, F16"]
    assert (row.first_token_ms.p50, row.inter_token_ms.p50, row.decode_tokens_per_s) == (750, 250, 4)
    assert (row.parameters, row.weight_bytes, row.kv_cache_bytes, row.load_s) == (7, 14, 11, 2)
    assert (row.logits_difference, row.perplexity, row.inter_token_floor_ms) == (0.01, None, None)
    assert row.decode_speedup_over_dense < 1
    assert case_text(row, row.case) == case_text(rows["dense"], row.case)  # one table
    assert "llama-cpp-python 1.0; the first 3 of 4 greedy tokens are those of dense." in outcome.text


@pytest.mark.parametrize(
    ("family", "head_dim", "sizes"), [("llama", 8, Case(1, 8, 4, 0)), ("qwen3", 16, Case(3, 7, 5, 6))]
)
def test_llama_cpp_decodes_what_the_dense_model_decodes(family: str, head_dim: int, sizes: Case) -> None:
    pytest.importorskip("llama_cpp")
    dense = tiny_model(family, head_dim=head_dim)
    with yardstick.yardsticks(["llama.cpp"], dense) as (half, quantized):
        for same, largest in ((half, 5e-3), (quantized, 5e-2)):
            same.prepare(sizes)
            assert same.agreement(sizes).apart < largest
            time = same.generate(sizes)
            assert len(time.steps_s) == sizes.new_tokens
            assert 0 < time.prefill_s <= time.first_token_s
        assert half.agreement(sizes).same == sizes.new_tokens + 1
        assert time.kv_cache_bytes == sum(sizes[1:]) * sizes.batch_size * 3 * 2 * 2 * head_dim * 2
