"""Tokens of a draft model that vLLM's target model accepts, and the speed-up that follows.

``python -m benchmarks.speculative TARGET DRAFT... -o speculative.jsonl`` serves the target alone, then with each draft,
then each draft alone. It continues texts of six kinds greedily, one request at a time. With ``p_i`` the share of steps
that accept the first i tokens of the draft and ``c`` the time of the draft's step over the target's, k tokens predict
the speed-up ``(1 + p_1 + ... + p_k) / (1 + c k)``; checking k + 1 tokens is taken to cost as much as one. Acceptance
does not depend on other load, times do.
"""

from __future__ import annotations

import json
import re
import tempfile
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers import AutoTokenizer

from grasp.bench.conditions import conditions, measure_card
from grasp.bench.servers import COMMAND, Process, Server, fetch, free_port, start
from grasp.calibration import builtin_kinds, tokenize
from grasp.loading import DTYPES

COUNTER = re.compile(r'^vllm:(\w+)\{(?:.*?position="(\d+)")?.*\} (\S+)$', re.MULTILINE)
PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Measured:
    """One server.

    Attributes:
        target: the model whose tokens are answered.
        draft: ``None`` for the target alone.
        dtype: of the server.
        proposed: tokens that the draft proposes in a step, k.
        steps: steps with a draft.
        accepted: share of the steps that accept the first i + 1 tokens.
        answered: tokens of all answers.
        equal: share of the answers that are those of the target alone; rounding differs between batch sizes.
        ms_per_token: mean time per token after the first.
        vllm: version.
        conditions: of the machine.
    """

    target: str
    draft: str | None
    dtype: str
    proposed: int
    steps: int
    accepted: tuple[float, ...]
    answered: int
    equal: float | None
    ms_per_token: float
    vllm: str | None
    conditions: dict[str, object]

    def tokens_per_step(self, k: int) -> float:
        """Expected tokens of a step with k tokens of the draft."""
        return 1 + sum(self.accepted[:k])


class Bench:
    """The prompts, and the answers of the target alone."""

    def __init__(self, target: Path, dtype: str, per_kind: int, new_tokens: int, options: list[str]) -> None:
        self.target, self.dtype, self.new_tokens, self.options = target, dtype, new_tokens, options
        tokenizer = AutoTokenizer.from_pretrained(target)
        length = per_kind * PROMPT_TOKENS
        texts = (tokenize(tokenizer, text, limit=length) for text in builtin_kinds("evaluation").values())
        self.prompts = [prompt.tolist() for text in texts for prompt in text.split(PROMPT_TOKENS)]
        self.answers: list[list[int]] = []
        device = torch.device("cpu")
        self.now = asdict(conditions(measure_card(device, DTYPES[dtype]), device))

    def measure(self, model: Path, draft: Path | None = None, proposed: int = 0) -> Measured:
        """Serve a model, with a draft if there is one, and continue all prompts."""
        arguments = ["--model", str(model), "--served-model-name", model.name, "--dtype", self.dtype, *self.options]
        if draft is not None:
            settings = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": proposed}
            arguments += ["--speculative-config", json.dumps(settings)]
        with tempfile.TemporaryDirectory() as scratch:
            port = free_port()
            log = Path(scratch) / "server.log"
            with Process([*COMMAND, *arguments, "--port", str(port)], log, offline=True) as process:
                server = start(process, model.name, f"http://127.0.0.1:{port}", 1800)
                self._answers(server, self.prompts[:1])  # compiles
                before = counters(server)
                answers = self._answers(server, self.prompts)
                after = counters(server)
        if model == self.target and draft is None:
            self.answers = answers
        gained = {name: value - before.get(name, 0) for name, value in after.items()}
        steps = gained.get(("spec_decode_num_drafts_total", ""), 0)
        accepted = [gained["spec_decode_num_accepted_tokens_per_pos_total", str(i)] / steps for i in range(proposed)]
        answered = len(answers) * self.new_tokens
        equal = sum(a == b for a, b in zip(answers, self.answers, strict=True)) / len(answers)
        return Measured(
            target=model.name,
            draft=None if draft is None else draft.name,
            dtype=self.dtype,
            proposed=proposed,
            steps=int(steps),
            accepted=tuple(accepted),
            answered=answered,
            equal=equal if model == self.target else None,
            ms_per_token=1000 * gained["request_decode_time_seconds_sum", ""] / (answered - len(answers)),
            vllm=server.version,
            conditions=self.now,
        )

    def _answers(self, server: Server, prompts: list[list[int]]) -> list[list[int]]:
        asked = {"model": server.model, "max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True}
        asked["return_token_ids"] = True
        url = f"{server.url}/v1/completions"
        return [fetch(url, {**asked, "prompt": prompt})["choices"][0]["token_ids"] for prompt in prompts]


def counters(server: Server) -> dict[tuple[str, str], float]:
    """The server's numbers by name and, where they have one, position in a draft."""
    with urllib.request.urlopen(f"{server.url}/metrics") as answer:
        text = answer.read().decode()
    return {(name, position): float(value) for name, position, value in COUNTER.findall(text)}


def main(
    target: Path,
    drafts: list[Path],
    output: Annotated[Path, typer.Option("-o", help="JSON lines are appended.")],
    tokens: Annotated[str, typer.Option(help="Tokens of a draft in a step, such as 1,2,4.")] = "4",
    dtype: str = "bfloat16",
    per_kind: Annotated[int, typer.Option(help="Prompts of each kind of text.")] = 4,
    new_tokens: int = 128,
    vllm_options: str = "--max-model-len 512 --max-num-seqs 4",
) -> None:
    """Measure a target with drafts."""
    bench = Bench(target, dtype, per_kind, new_tokens, vllm_options.split())

    def keep(measured: Measured) -> Measured:
        with output.open("a") as file:
            file.write(json.dumps(asdict(measured)) + "\n")
        return measured

    alone = keep(bench.measure(target))
    print(f"{target.name}: {alone.ms_per_token:.1f} ms per token")
    for draft in drafts:
        cost = keep(bench.measure(draft)).ms_per_token / alone.ms_per_token
        for k in map(int, tokens.split(",")):
            got = keep(bench.measure(target, draft, k))
            accepted, speed = " ".join(f"{p:.3f}" for p in got.accepted), alone.ms_per_token / got.ms_per_token
            predicted = ", ".join(f"{i}: {got.tokens_per_step(i) / (1 + cost * i):.2f}" for i in range(1, k + 1))
            print(f"{draft.name}, c = {cost:.2f}, {k} tokens: accepted {accepted}; equal answers {got.equal:.0%};")
            print(f"  speed-up {speed:.2f}; predicted for {predicted}")
    again = keep(bench.measure(target))
    print(f"{target.name} again: {again.ms_per_token:.1f} ms per token")


if __name__ == "__main__":
    typer.run(main)
