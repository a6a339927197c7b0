"""Greedy tokens of a vLLM engine in its own process: ``python -m tests.vllm.generate REQUEST.json OUTPUT.json``."""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main(request: Path, output: Path) -> None:
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    asked = json.loads(request.read_text())
    engine = LLM(asked["model"], **asked["engine"])
    answers = engine.generate(
        [{"prompt_token_ids": prompt} for prompt in asked["prompts"]],
        SamplingParams(temperature=0, max_tokens=asked["new_tokens"], ignore_eos=True, detokenize=False),
        lora_request=LoRARequest("adapter", 1, asked["adapter"]) if asked["adapter"] else None,
    )
    output.write_text(json.dumps([list(answer.outputs[0].token_ids) for answer in answers]))


if __name__ == "__main__":  # vLLM's processes import this module again
    main(Path(sys.argv[1]), Path(sys.argv[2]))
