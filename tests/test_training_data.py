from __future__ import annotations

import json
from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch

from grasp.errors import TrainingDataError
from grasp.training_data import (
    Instruction,
    TrainingSequence,
    collate,
    digest,
    hold_out,
    instruction_sequences,
    pack_text,
    read_instructions,
    shuffled,
)
from tests.tiny_tokenizers import BOS, byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% if m['role'] == 'assistant' %}!{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def numbered(count: int) -> list[TrainingSequence]:
    return [TrainingSequence(torch.tensor([i, i]), torch.tensor([False, True])) for i in range(count)]


@pytest.mark.parametrize("adds_bos", [False, True])
def test_a_text_is_split_without_losing_a_token(adds_bos: bool) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    text = "abcdefghijklm"
    sequences = pack_text(tokenizer, text, 5)
    bodies = [item.input_ids[1:] if adds_bos else item.input_ids for item in sequences]
    assert tokenizer.decode(torch.cat(bodies)) == text
    assert [len(item.input_ids) for item in sequences] == ([5, 5, 5, 2] if adds_bos else [5, 5, 3])
    assert all(item.input_ids[0] == BOS for item in sequences) == adds_bos
    assert all(item.counts.tolist() == [False, *[True] * (len(item.counts) - 1)] for item in sequences)


def test_a_single_last_token_is_not_a_sequence() -> None:
    assert [len(item.input_ids) for item in pack_text(byte_tokenizer(), "abcdef", 5)] == [5]
    with pytest.raises(ValueError, match="seq_len must be at least 2, got 1"):
        pack_text(byte_tokenizer(), "abc", 1)


def test_padding_of_a_batch_is_not_counted() -> None:
    long = TrainingSequence(torch.arange(4), torch.tensor([False, False, True, True]))
    batch = collate([long, *numbered(1)])
    assert batch.input_ids.tolist() == [[0, 1, 2, 3], [0, 0, 0, 0]]
    assert batch.is_target.tolist() == [[False, True, True], [True, False, False]]


@pytest.mark.parametrize(("chat", "head", "tail"), [(True, "<user>Add.\n\n1 2<assistant>", "3!"), (False, None, "3")])
def test_only_the_tokens_of_the_answer_count(chat: bool, head: str | None, tail: str) -> None:
    tokenizer = byte_tokenizer(adds_bos=not chat)
    tokenizer.chat_template = CHAT if chat else None
    (item,) = instruction_sequences(tokenizer, [Instruction("Add.", "1 2", "3")], 256)
    counted, rest = tokenizer.decode(item.input_ids[item.counts]), tokenizer.decode(item.input_ids[~item.counts])
    assert counted == (tail if chat else f"{tail}</s>")
    if chat:
        assert rest == head
    else:
        assert rest.startswith("<s>")
        assert rest.endswith("### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n")
    without_input = instruction_sequences(tokenizer, [Instruction("Add.", "", "3")], 256)[0]
    assert "Input" not in tokenizer.decode(without_input.input_ids)


def test_an_instruction_without_room_for_its_answer_is_skipped_and_a_truncated_answer_is_not() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = CHAT
    instructions = [Instruction("x" * 100, "", "answer"), Instruction("x", "", "answer")]
    (item,) = instruction_sequences(tokenizer, instructions, 20)
    assert tokenizer.decode(item.input_ids[item.counts]) == "an"
    with pytest.raises(TrainingDataError, match="all 1 instructions fill 20 tokens"):
        instruction_sequences(tokenizer, instructions[:1], 20)


def test_a_template_that_changes_the_prompt_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ messages | length }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    with pytest.raises(TrainingDataError, match="chat template"):
        instruction_sequences(tokenizer, [Instruction("a", "", "b")], 20)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no user') }}", "{% if %}", "{{ messages[0].foo.bar }}", "{{ 1 // 0 }}"]
)
def test_a_template_that_fails_is_refused(template: str) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(TrainingDataError, match=r"chat template of the tokenizer fails \(\w+: .*remove it"):
        instruction_sequences(tokenizer, [Instruction("a", "", "b")], 20)


def test_instructions_are_read_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    lines = [{"instruction": "a", "input": "", "output": "b"}, {"instruction": "c", "output": "d"}]
    path.write_text("\n\n".join(map(json.dumps, lines)), encoding="utf-8-sig")
    assert read_instructions(path) == [Instruction("a", "", "b"), Instruction("c", "", "d")]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is a JSON list, not an object"),
        ('{"instruction": "a"}', "line 2 of .*; expected an object with"),
        ('{"instruction": "a", "output": 3}', "is {"),
    ],
)
def test_a_line_in_another_format_is_named(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "some.jsonl"
    path.write_text('{"instruction": "a", "output": "b"}\n' + line)
    with pytest.raises(TrainingDataError, match=words):
        read_instructions(path)


def test_files_without_instructions_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(TrainingDataError, match="has no instructions"):
        read_instructions(tmp_path / "empty")
    for name, words in (("binary", "line 1 of .* is not UTF-8"), ("missing", "there is no file")):
        with pytest.raises(TrainingDataError, match=words):
            read_instructions(tmp_path / name)


@pytest.mark.parametrize(("count", "held"), [(2, 1), (39, 1), (40, 2), (10_000, 32)])
def test_evenly_spaced_sequences_are_held_out(count: int, held: int) -> None:
    sequences = numbered(count)
    train, held_out = hold_out(sequences)
    places = [i for i, sequence in enumerate(sequences) if any(sequence is other for other in held_out)]
    assert [sequences[i] for i in places] == held_out
    assert [sequence for i, sequence in enumerate(sequences) if i not in places] == train
    assert len(held_out) == held
    steps = [b - a for a, b in pairwise(places)]
    assert max(steps, default=0) - min(steps, default=0) <= 1
    assert abs(places[0] - (count - 1 - places[-1])) <= 1  # as far from either end


def test_a_single_sequence_cannot_be_held_out_and_trained_on() -> None:
    with pytest.raises(TrainingDataError, match="1 sequences; expected at least 2"):
        hold_out(numbered(1))


def test_each_epoch_has_every_index_once_in_a_new_order() -> None:
    drawn = list(islice(shuffled(20, 0), 60))
    passes = [drawn[:20], drawn[20:40], drawn[40:]]
    assert all(sorted(order) == list(range(20)) for order in passes)
    assert len({tuple(order) for order in passes}) == 3
    assert drawn == list(islice(shuffled(20, 0), 60)) != list(islice(shuffled(20, 1), 60))


def test_the_digest_depends_on_ids_and_masks() -> None:
    one, other = numbered(2), numbered(2)
    assert digest(one) == digest(other)
    other[1] = TrainingSequence(other[1].input_ids, torch.tensor([False, False]))
    assert digest(one) != digest(other)
