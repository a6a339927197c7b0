"""``grasp bench serve`` with a real vLLM and its own client, dense and compressed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from grasp.bench.results import read_results
from grasp.bench.serve_records import ServeResult
from tests.command_line import ROOT
from tests.tiny_tokenizers import byte_tokenizer
from tests.vllm.engines import TIMEOUT, save_compressed, vllm_environment

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

VLLM = "--enforce-eager --max-model-len 128 --max-num-seqs 8 --kv-cache-memory-bytes 67108864"
OPTIONS = {
    **{"concurrency": "1,2", "requests": 2, "rounds": 2, "prompt-tokens": 16, "new-tokens": 8},
    **{"goodput": "ttft:60000,tpot:0", "vllm-options": VLLM},
}


def test_dense_and_compressed_are_served_and_timed_in_turn(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    save_compressed(tmp_path / "dense", "llama", {}, vocab_size=len(tokenizer))
    save_compressed(tmp_path / "small", "llama", vocab_size=len(tokenizer))
    for name in ("dense", "small"):
        tokenizer.save_pretrained(tmp_path / name)
    arguments = [str(tmp_path / name) for name in ("dense", "small")]
    arguments += [text for name, value in OPTIONS.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "grasp", "bench", "serve", *arguments, "-o", str(tmp_path / "serve.jsonl")],
        cwd=ROOT,
        env=vllm_environment(),
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    results = [line for line in read_results(tmp_path / "serve.jsonl") if isinstance(line, ServeResult)]
    assert [(line.provider, line.concurrency) for line in results] == [
        (name, concurrency) for concurrency in (1, 2) for name in ("dense", "small")
    ]
    for line in results:
        assert line.log_probability_error is not None
        assert line.log_probability_error < 1e-4  # in fp32
        assert line.good_requests_per_s == 0
        assert 0 < line.first_token_ms.p50 < line.end_to_end_ms.p50
        assert line.output_token_ms.p50 > 0
        assert len(line.client) == 2
        assert line.throughput_speedup is not None
        assert line.vllm is not None
