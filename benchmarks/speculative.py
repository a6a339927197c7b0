"""Tokens of a draft model that vLLM's target model accepts, and the speed-up.

``python -m benchmarks.speculative TARGET DRAFT... -o speculative.jsonl`` serves each draft alone and as the target's
draft, and the target alone before each of these and at the end. A speed-up is over the target's run before it, so that
a machine that grows slower shows as a drift of the target's own. It continues texts of six kinds greedily, one request
at a time. With ``p_i`` the share of steps that accept the first i tokens of the draft and ``c`` the time of the draft's
step over the target's, k tokens predict the speed-up ``(1 + p_1 + ... + p_k) / (1 + c k)``; checking k + 1 tokens is
taken to cost as much as one. Acceptance does not depend on other load, times do.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from transformers import AutoTokenizer

from benchmarks.study.records import STUDY_RECORDS, StudyDraft
from grasp.bench.conditions import conditions, measure_card
from grasp.bench.results import append_results, check_output
from grasp.bench.servers import COMMAND, HOST, Process, Server, fetch, fetch_text, free_port, start
from grasp.calibration import builtin_kinds, tokenize
from grasp.cli.bench_tables import show_results
from grasp.errors import GraspError
from grasp.loading import DTYPES

COUNTER = re.compile(r'^vllm:(\w+)\{(?:.*?position="(\d+)")?.*\} (\S+)$', re.MULTILINE)
PROMPT_TOKENS = 128
Counters = Mapping[tuple[str, str], float]


class Bench:
    """The prompts, and the records of the servers; the first is the target alone."""

    def __init__(self, target: Path, output: Path, dtype: str, per_kind: int, new_tokens: int, options: str) -> None:
        self.output, self.dtype, self.new_tokens, self.options = output, dtype, new_tokens, options.split()
        tokenizer = AutoTokenizer.from_pretrained(target)
        texts = (
            tokenize(tokenizer, text, limit=per_kind * PROMPT_TOKENS) for text in builtin_kinds("evaluation").values()
        )
        self.prompts = [prompt.tolist() for text in texts for prompt in text.split(PROMPT_TOKENS)]
        device = torch.device("cpu")
        self.conditions = conditions(measure_card(device, DTYPES[dtype]), device)
        self.answers: list[list[int]] = []
        self.alone: StudyDraft | None = None
        self.records: list[StudyDraft] = []

    def measure_alone(self, target: Path) -> None:
        """Measure the target that the next speed-ups are over."""
        self.alone = None
        self.alone = self.measure(target)

    def measure(self, model: Path, draft: Path | None = None, proposed: int = 0, cost: float = 0) -> StudyDraft:
        """Serve a model, with a draft if there is one, continue all prompts, and keep the record.

        The draft proposes ``proposed`` tokens in a step; ``cost`` is the time of its step over the target's.
        """
        arguments = ["--model", str(model), "--served-model-name", model.name, "--dtype", self.dtype, *self.options]
        if draft is not None:
            settings = {"method": "draft_model", "model": str(draft), "num_speculative_tokens": proposed}
            arguments += ["--speculative-config", json.dumps(settings)]
        with tempfile.TemporaryDirectory() as scratch:
            port = free_port()
            command = [*COMMAND, *arguments, "--host", HOST, "--port", str(port)]
            with Process(command, Path(scratch, "server.log"), offline=True) as process:
                server = start(process, model.name, f"http://{HOST}:{port}", 1800)
                self._continue(server, self.prompts[:1])  # compiles
                before = read_counters(server)
                answers = self._continue(server, self.prompts)
                gained = {name: value - before.get(name, 0) for name, value in read_counters(server).items()}
        self.answers = self.answers or answers
        steps = gained.get(("spec_decode_num_drafts_total", ""), 0)
        accepted = [gained["spec_decode_num_accepted_tokens_per_pos_total", str(i)] / steps for i in range(proposed)]
        answered = sum(map(len, answers))
        ms = 1000 * gained["request_decode_time_seconds_sum", ""] / (answered - len(answers))
        record = StudyDraft(
            target=model.name,
            draft=None if draft is None else draft.name,
            proposed=proposed,
            steps=int(steps),
            accepted=tuple(accepted),
            answered=answered,
            equal=sum(a == b for a, b in zip(answers, self.answers, strict=True)) / len(answers),
            ms_per_token=ms,
            speed_up=self.alone.ms_per_token / ms if self.alone else 1.0,
            predicted=(1 + sum(accepted)) / (1 + cost * proposed) if draft else None,
            dtype=self.dtype,
            vllm=server.version,
            conditions=self.conditions,
        )
        append_results(self.output, [record])
        self.records.append(record)
        return record

    def _continue(self, server: Server, prompts: list[list[int]]) -> list[list[int]]:
        asked = {"model": server.model, "max_tokens": self.new_tokens, "temperature": 0, "ignore_eos": True}
        asked["return_token_ids"] = True
        url = f"{server.url}/v1/completions"
        return [fetch(url, {**asked, "prompt": prompt})["choices"][0]["token_ids"] for prompt in prompts]


def read_counters(server: Server) -> Counters:
    """The server's numbers by name and, where they have one, position in a draft."""
    text = fetch_text(f"{server.url}/metrics")
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
    try:
        check_output(output, STUDY_RECORDS)
        bench = Bench(target, output, dtype, per_kind, new_tokens, vllm_options)
        for draft in drafts:
            bench.measure_alone(target)
            cost = 1 / bench.measure(draft).speed_up
            for k in map(int, tokens.split(",")):
                bench.measure_alone(target)
                bench.measure(target, draft, k, cost)
        bench.measure_alone(target)
    except (GraspError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", soft_wrap=True)
        raise typer.Exit(2) from error
    show_results(bench.records)


if __name__ == "__main__":
    typer.run(main)
