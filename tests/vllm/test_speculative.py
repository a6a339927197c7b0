"""``python -m benchmarks.speculative`` with a real vLLM: the target alone, with a draft, and the draft alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.speculative import main
from tests.tiny_tokenizers import byte_tokenizer
from tests.vllm.engines import RANKS, save_compressed, vllm_environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

VLLM = "--enforce-eager --max-num-seqs 4 --kv-cache-memory-bytes 67108864"


def test_a_target_is_measured_before_each_draft_and_at_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable, value in vllm_environment().items():
        monkeypatch.setenv(variable, value)
    tokenizer = byte_tokenizer()
    shape = {"max_position_embeddings": 256, "vocab_size": len(tokenizer)}
    for name, ranks in (("dense", {}), ("draft", dict.fromkeys(RANKS["llama"], 30))):
        save_compressed(tmp_path / name, "llama", ranks, **shape)
        tokenizer.save_pretrained(tmp_path / name)
    output = tmp_path / "speculative.jsonl"
    main(tmp_path / "dense", [tmp_path / "draft"], output, "2", "float32", 1, 16, VLLM)
    first_alone, draft, alone, both, again = lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["draft"] for line in lines] == [None, None, None, "draft", None]
    assert draft["target"] == "draft"
    assert alone["equal"] == both["equal"] == again["equal"] == 1 > draft["equal"]
    cost = draft["ms_per_token"] / first_alone["ms_per_token"]
    assert both["predicted"] == pytest.approx((1 + sum(both["accepted"])) / (1 + 2 * cost))
    assert both["speed_up"] == pytest.approx(alone["ms_per_token"] / both["ms_per_token"])
    first, second = both["accepted"]
    assert 0 < second <= first < 1
    assert both["steps"] * (1 + first + second) == pytest.approx(both["answered"], rel=0.2)
    assert first_alone["speed_up"] == alone["speed_up"] == again["speed_up"] == 1
