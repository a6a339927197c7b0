"""Text and instructions → the sequences that a compressed model is fine-tuned on."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp.calibration import bos_for, tokenize
from grasp.errors import TrainingDataError
from grasp.files import tensors_digest

HELD_OUT_SHARE = 0.05  # of the sequences, but
HELD_OUT_MOST = 32  # no more than this

_REQUEST = "Carry out the instruction.\n\n### Instruction:\n{instruction}\n\n"
_MATERIAL = "### Input:\n{input}\n\n"
_ANSWER = "### Response:\n"


class TrainingSequence(NamedTuple):
    """Token ids (L,) int64, and a bool mask (L,) of those that the loss counts, never the first."""

    input_ids: Tensor
    counts: Tensor


class TrainingBatch(NamedTuple):
    """Token ids (B, L) int64, and a bool mask (B, L - 1): whether the token after each position counts.

    Shorter sequences are filled up at their end, which no token before it sees: the model needs no mask.
    """

    input_ids: Tensor
    is_target: Tensor
    attention_mask: None = None


class Instruction(NamedTuple):
    """A request, what it is about where that is apart, and the answer to learn."""

    instruction: str
    input: str
    output: str


def collate(sequences: Sequence[TrainingSequence]) -> TrainingBatch:
    """Sequences as one batch as long as the longest."""
    length = max(len(sequence.input_ids) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    counts = torch.zeros(len(sequences), length, dtype=torch.bool)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence.input_ids)] = sequence.input_ids
        counts[row, : len(sequence.counts)] = sequence.counts
    return TrainingBatch(ids, counts[:, 1:])


def digest(sequences: Iterable[TrainingSequence]) -> str:
    """SHA-256 of all sequences, in hexadecimal."""
    return tensors_digest((name, tensor) for item in sequences for name, tensor in item._asdict().items())


def pack_text(tokenizer: PreTrainedTokenizerBase, text: str, seq_len: int) -> list[TrainingSequence]:
    """Cut a text into sequences of ``seq_len`` tokens, the last one shorter; each starts with a BOS if texts do.

    Raises:
        ValueError: if ``seq_len`` is too small.
    """
    _require_length(seq_len)
    bos = bos_for(tokenizer)
    prefix = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
    rows = [torch.cat([prefix, part]) for part in tokenize(tokenizer, text).split(seq_len - len(prefix))]
    return [TrainingSequence(row, torch.arange(len(row)) > 0) for row in rows if len(row) > 1]


def read_instructions(path: str | Path) -> list[Instruction]:
    """Read a file of one JSON object a line, with ``instruction``, ``output`` and perhaps ``input``: Alpaca's form.

    Raises:
        TrainingDataError: if there is no such file, or a line is none of these; the message has its number.
    """
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingDataError(
            f"the instructions {path} cannot be read ({error}); give a JSONL file in UTF-8"
        ) from error
    found = [_instruction(line, f"line {number} of {path}") for number, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise TrainingDataError(f"{path} has no instructions; expected one JSON object a line")
    return found


def instruction_sequences(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[Instruction], seq_len: int
) -> list[TrainingSequence]:
    """A sequence for each instruction, in which only the tokens of the answer count.

    The tokenizer's chat template says how they are put; without one, headings do. What is longer than ``seq_len`` is
    cut off at the end; where nothing of the answer is left, the sequence is left out.

    Raises:
        TrainingDataError: if no sequence is left.
        ValueError: if ``seq_len`` is too small.
    """
    _require_length(seq_len)
    result = []
    for instruction in instructions:
        prompt, answer = _parts(tokenizer, instruction)
        ids = torch.cat([prompt, answer])[:seq_len]
        counts = torch.arange(len(ids)) >= max(1, len(prompt))
        if counts.any():
            result.append(TrainingSequence(ids, counts))
    if not result:
        raise TrainingDataError(
            f"all {len(instructions)} instructions fill {seq_len} tokens before their answers begin; take a longer "
            "seq_len"
        )
    return result


def hold_out(sequences: Sequence[TrainingSequence]) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """The sequences to train on, and the last few, which decide when to stop: a twentieth of all, at most 32.

    Raises:
        TrainingDataError: if there are too few for both.
    """
    count = min(HELD_OUT_MOST, max(1, int(HELD_OUT_SHARE * len(sequences))))
    if len(sequences) <= count:
        raise TrainingDataError(
            f"the data make {len(sequences)} sequences; expected at least 2, one to train on and one held out. Give "
            "more data or a shorter seq_len"
        )
    return list(sequences[:-count]), list(sequences[-count:])


def shuffled(count: int, seed: int) -> Iterator[int]:
    """The numbers below ``count`` in random order, again and again, each time in another."""
    for again in range(2**62):
        order = list(range(count))
        random.Random(f"{seed} {again}").shuffle(order)
        yield from order


def _instruction(line: str, place: str) -> Instruction:
    try:
        values = json.loads(line)
    except ValueError as error:
        raise TrainingDataError(f"{place} is no JSON ({error}); expected one object a line") from error
    values = values if isinstance(values, dict) else {}
    request, material, answer = (values.get(name, "") for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (request, material, answer)) or not request or not answer:
        raise TrainingDataError(
            f"{place} must be an object with the texts instruction and output, and perhaps input; got "
            f"{line.strip()[:80]}"
        )
    return Instruction(request, material, answer)


def _parts(tokenizer: PreTrainedTokenizerBase, instruction: Instruction) -> tuple[Tensor, Tensor]:
    """The tokens of what the model is given, and of what it is to answer, the end of its turn included."""
    request, material, answer = instruction
    if tokenizer.chat_template is None:
        bos = bos_for(tokenizer)
        prefix = torch.tensor([] if bos is None else [bos], dtype=torch.int64)
        head = _REQUEST.format(instruction=request) + (_MATERIAL.format(input=material) if material else "") + _ANSWER
        tail = answer + (tokenizer.eos_token or "")
        return torch.cat([prefix, tokenize(tokenizer, head)]), tokenize(tokenizer, tail)
    turns = [
        {"role": "user", "content": f"{request}\n\n{material}" if material else request},
        {"role": "assistant", "content": answer},
    ]
    head = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
    whole = str(tokenizer.apply_chat_template(turns, tokenize=False))
    if not whole.startswith(head):
        raise TrainingDataError(
            "the tokenizer's chat template puts a request in another way when its answer follows, so the answer cannot "
            "be told from it; remove the template (tokenizer.chat_template = None) or give plain text"
        )
    return tokenize(tokenizer, head), tokenize(tokenizer, whole[len(head) :])


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
