"""Greedy tokens of an SGLang engine: ``python -m tests.sglang.generate FOLDER PROCESSES OUTPUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.vllm.engines import NEW_TOKENS, PROMPTS


def main(folder: str, processes: int, output: Path) -> None:
    import sglang

    engine = sglang.Engine(
        model_path=folder,
        tp_size=processes,
        device="cpu",
        dtype="float32",
        attention_backend="torch_native",
        sampling_backend="pytorch",
        grammar_backend="none",
        skip_tokenizer_init=True,
        disable_cuda_graph=True,
        disable_overlap_schedule=True,
        disable_radix_cache=True,
        context_length=128,
        max_total_tokens=1024,
        max_running_requests=8,
        log_level="warning",
    )
    asked = {"temperature": 0, "max_new_tokens": NEW_TOKENS, "ignore_eos": True}
    answers = engine.generate(input_ids=PROMPTS, sampling_params=asked)
    output.write_text(json.dumps([answer["output_ids"] for answer in answers]))
    engine.shutdown()


if __name__ == "__main__":  # SGLang's processes import this module again
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]))
