"""Text or instructions → the sequences that ``recover_`` trains on."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp.calibration import bos_for, tokenize
from grasp.errors import TrainingDataError
from grasp.files import expanded, tensors_digest
from grasp.formatting import one_line
from grasp.reading import parse_json, read_lines

HELD_OUT_FRACTION = 0.05  # of the sequences
MAX_HELD_OUT = 32  # sequences

_PROMPT = "Carry out the instruction.\n\n### Instruction:\n{instruction}\n\n"
_INPUT = "### Input:\n{input}\n\n"
_ANSWER = "### Response:\n"
_LINE = "an object with the strings instruction, output and optionally input"


class TrainingSequence(NamedTuple):
    """Token ids (L,) int64, and a bool mask (L,) of the tokens that the loss counts; it is false for the first."""

    input_ids: Tensor
    counts: Tensor


class TrainingBatch(NamedTuple):
    """Token ids (B, L) int64, and a bool mask (B, L - 1): whether the loss counts the token after each position.

    Shorter sequences are padded at the end. Attention is causal, so no attention mask is needed.
    """

    input_ids: Tensor
    is_target: Tensor
    attention_mask: None = None


class Instruction(NamedTuple):
    """A row in the Alpaca format: an instruction, its optional input (else empty), and the answer."""

    instruction: str
    input: str
    output: str


def collate(sequences: Sequence[TrainingSequence]) -> TrainingBatch:
    """Pad sequences to the length of the longest one, and stack them."""
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


def pack_text(tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], seq_len: int) -> list[TrainingSequence]:
    """Split a text, or the pieces of one, into sequences of ``seq_len`` tokens. The last one may be shorter.

    Each starts with a BOS token if the tokenizer adds one.

    Raises:
        ValueError: if ``seq_len`` is too small.
    """
    _require_length(seq_len)
    prefix = _prefix(tokenizer)
    rows = [torch.cat([prefix, part]) for part in tokenize(tokenizer, text).split(seq_len - len(prefix))]
    return [TrainingSequence(row, torch.arange(len(row)) > 0) for row in rows if len(row) > 1]


def read_instructions(path: str | Path) -> list[Instruction]:
    """Read a JSONL file in the Alpaca format: objects with ``instruction``, ``output`` and optionally ``input``.

    Raises:
        TrainingDataError: if the file cannot be read, or a line has another format; the message has its number.
    """
    expected = "a JSONL file of instructions in UTF-8"
    lines = read_lines(expanded(path), expected, TrainingDataError)
    rows = [_instruction(line, f"line {number} of {path}") for number, line in lines]
    if not rows:
        raise TrainingDataError(f"{path} has no instructions; expected one JSON object per line")
    return rows


def instruction_sequences(
    tokenizer: PreTrainedTokenizerBase, instructions: Sequence[Instruction], seq_len: int
) -> list[TrainingSequence]:
    """One sequence per instruction; the loss counts only the tokens of the answer.

    Prompts use the chat template of the tokenizer, or the Alpaca headings if it has none. Sequences are truncated to
    ``seq_len`` tokens. A sequence without any token of its answer is skipped.

    Raises:
        TrainingDataError: if all sequences are skipped.
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
            f"the prompts of all {len(instructions)} instructions fill {seq_len} tokens and leave no room for answers; "
            "use a longer seq_len"
        )
    return result


def hold_out(sequences: Sequence[TrainingSequence]) -> tuple[list[TrainingSequence], list[TrainingSequence]]:
    """Split off 5 % of the sequences, at most 32, evenly spaced: training sequences, then held-out sequences.

    Raises:
        TrainingDataError: if there are fewer than two sequences.
    """
    count = min(MAX_HELD_OUT, max(1, int(HELD_OUT_FRACTION * len(sequences))))
    if len(sequences) <= count:
        raise TrainingDataError(
            f"the data have {len(sequences)} sequences; expected at least 2, one for training and one held out. Use "
            "more data or a shorter seq_len"
        )
    chosen = [(2 * index + 1) * len(sequences) // (2 * count) for index in range(count)]
    return [item for i, item in enumerate(sequences) if i not in chosen], [sequences[i] for i in chosen]


def shuffled(count: int, seed: int) -> Iterator[int]:
    """Endless indices below ``count``, in a new random order in every epoch."""
    for epoch in range(2**62):
        order = list(range(count))
        random.Random(f"{seed} {epoch}").shuffle(order)
        yield from order


def _instruction(line: str, place: str) -> Instruction:
    values = parse_json(line, place, _LINE, TrainingDataError)
    prompt, context, answer = (values.get(name, "") for name in ("instruction", "input", "output"))
    if not all(isinstance(text, str) for text in (prompt, context, answer)) or not prompt or not answer:
        raise TrainingDataError(f"{place} is {line.strip()[:80]}; expected {_LINE}")
    return Instruction(prompt, context, answer)


def _prefix(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """The BOS token, if the tokenizer adds one, as a tensor (0 or 1,)."""
    bos = bos_for(tokenizer)
    return torch.tensor([] if bos is None else [bos], dtype=torch.int64)


def _parts(tokenizer: PreTrainedTokenizerBase, instruction: Instruction) -> tuple[Tensor, Tensor]:
    """The tokens of the prompt, and those of the answer with its end-of-turn token."""
    prompt, context, answer = instruction
    if tokenizer.chat_template is None:
        head = _PROMPT.format(instruction=prompt) + (_INPUT.format(input=context) if context else "") + _ANSWER
        tail = answer + (tokenizer.eos_token or "")
        return torch.cat([_prefix(tokenizer), tokenize(tokenizer, head)]), tokenize(tokenizer, tail)
    turns = [
        {"role": "user", "content": f"{prompt}\n\n{context}" if context else prompt},
        {"role": "assistant", "content": answer},
    ]
    try:
        head = str(tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True))
        conversation = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception as error:  # a template is a program of the model's authors
        raise TrainingDataError(
            f"the chat template of the tokenizer fails ({type(error).__name__}: {one_line(error)}) for a user's turn "
            "and an answer; mend it, remove it (tokenizer.chat_template = None) or use plain text"
        ) from error
    if not conversation.startswith(head):
        raise TrainingDataError(
            "the chat template of the tokenizer changes a prompt when an answer follows, so the answer cannot be "
            "separated; remove the template (tokenizer.chat_template = None) or use plain text"
        )
    return tokenize(tokenizer, head), tokenize(tokenizer, conversation[len(head) :])


def _require_length(seq_len: int) -> None:
    if seq_len < 2:
        raise ValueError(f"seq_len must be at least 2, got {seq_len}")
