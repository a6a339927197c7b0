from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from huggingface_hub.errors import HfHubHTTPError
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from grasp import builtin, calibration
from grasp.calibration import (
    batches_and_others,
    bos_for,
    builtin_kinds,
    builtin_text,
    first_token_batches,
    read_pieces,
    read_text,
    token_batches,
    tokenize,
)
from grasp.errors import CalibrationError, MissingPackageError
from grasp.model.batch import CalibrationBatch, as_batches, batches_digest
from grasp.statistics.loss import sum_nll
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import BOS, byte_tokenizer

# Every token occurs once, so that its value says where it comes from.
DISTINCT = "".join(chr(33 + i) for i in range(90))


@pytest.fixture(autouse=True)
def short_builtin_text() -> None:
    """Keep the texts whole, unlike tests/conftest.py."""


def rows(batches: list[CalibrationBatch]) -> list[list[int]]:
    return [] if not batches else torch.cat([batch.input_ids for batch in batches]).tolist()


def test_a_sample_is_contiguous_text_of_its_own() -> None:
    tokenizer = byte_tokenizer()
    text = tokenize(tokenizer, DISTINCT).tolist()
    samples = rows(token_batches(tokenizer, DISTINCT, num_samples=7, seq_len=11))
    assert [len(sample) for sample in samples] == 7 * [11]
    for sample in samples:
        start = text.index(sample[0])
        assert sample == text[start : start + 11]
    everything = [token for sample in samples for token in sample]
    assert len(set(everything)) == 77


def test_bos_takes_the_first_place_of_each_sample() -> None:
    samples = rows(token_batches(byte_tokenizer(adds_bos=True), DISTINCT, num_samples=9, seq_len=11))
    assert [sample[0] for sample in samples] == 9 * [BOS]
    everything = [token for sample in samples for token in sample[1:]]
    assert len(set(everything)) == 90
    assert BOS not in everything


def test_bos_is_used_where_the_tokenizer_adds_it_unasked() -> None:
    assert bos_for(byte_tokenizer(adds_bos=True)) == BOS
    assert bos_for(byte_tokenizer()) is None


def test_each_stretch_of_the_text_gives_one_sample_at_any_place() -> None:
    tokenizer = byte_tokenizer()
    text = tokenize(tokenizer, "abcdefg").tolist()
    seen: dict[tuple[int, ...], int] = {}
    for seed in range(1200):
        samples = rows(token_batches(tokenizer, "abcdefg", num_samples=2, seq_len=2, seed=seed))
        starts = tuple(text.index(sample[0]) for sample in samples)
        seen[starts] = seen.get(starts, 0) + 1
    ascending = {(first, second) for first in (0, 1) for second in (3, 4, 5)}
    assert set(seen) == ascending | {(second, first) for first, second in ascending}
    assert all(50 < count < 150 for count in seen.values())  # 100 ± 5 standard deviations


def test_the_seed_decides_and_the_batch_size_does_not() -> None:
    tokenizer = byte_tokenizer()

    def drawn(seed: int, batch_size: int) -> list[CalibrationBatch]:
        return token_batches(tokenizer, DISTINCT, num_samples=5, seq_len=6, batch_size=batch_size, seed=seed)

    assert rows(drawn(3, 1)) == rows(drawn(3, 2))
    assert rows(drawn(3, 1)) != rows(drawn(4, 1))
    assert [batch.input_ids.shape for batch in drawn(3, 2)] == [(2, 6), (2, 6), (1, 6)]
    assert batches_digest(drawn(3, 1)) == batches_digest(drawn(3, 2)) != batches_digest(drawn(4, 1))


@pytest.mark.parametrize(("others", "expected"), [(0, 0), (2, 2), (99, None)])
def test_other_sequences_are_none_of_the_drawn_ones_and_change_none(others: int, expected: int | None) -> None:
    tokenizer, sizes = byte_tokenizer(adds_bos=True), {"num_samples": 4, "seq_len": 8, "batch_size": 3}
    drawn, more = map(rows, batches_and_others(tokenizer, DISTINCT, **sizes, seed=1, others=others))
    assert drawn == rows(token_batches(tokenizer, DISTINCT, **sizes, seed=1))
    everything = [token for sample in drawn + more for token in sample[1:]]
    assert len(set(everything)) == len(everything) == 7 * len(drawn + more)
    assert len(more) in ({expected} if expected is not None else range(4, 9))  # 8 more have room, if no gap is odd


def test_first_tokens_are_those_of_the_text_and_special_ones() -> None:
    tokenizer, text = byte_tokenizer(), "".join(chr(33 + i % 90) for i in range(2048))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<user>"]}, replace_extra_special_tokens=False)
    batches = token_batches(tokenizer, text, num_samples=6, seq_len=256, batch_size=2)
    more = first_token_batches(tokenizer, batches, vocabulary=2, seed=1)
    assert [batch.input_ids.shape for batch in more] == [(48, 2)]  # a sixteenth as many tokens, at most 2 x 256
    tokens = tokenize(tokenizer, text).tolist()
    seen = {*pairwise(tokens)}
    drawn = [tuple(row) for row in rows(more)]
    assert {first for first, _ in drawn[:12]} <= {0, BOS}  # </s> and <user> are not in the vocabulary
    assert {second for _, second in drawn} <= {*tokens}
    assert {*drawn[12:]} <= seen
    assert len({*drawn[12:]}) > 20
    assert drawn != [tuple(row) for row in rows(first_token_batches(tokenizer, batches, vocabulary=2, seed=2))]


@pytest.mark.parametrize(
    ("length", "batch_size", "expected"),
    [(64, 1, [32, 32, 16]), (64, 4, [64, 16]), (320, 1, [64] * 6 + [16]), (320, 20, [100] * 4)],
)
def test_first_tokens_come_in_batches_that_take_no_more_memory(
    length: int, batch_size: int, expected: list[int]
) -> None:
    batches = token_batches(byte_tokenizer(), DISTINCT * 150, num_samples=40, seq_len=length, batch_size=batch_size)
    more = first_token_batches(byte_tokenizer(), batches, vocabulary=99)
    assert [len(batch.input_ids) for batch in more] == expected


@pytest.mark.parametrize(("adds_bos", "samples"), [(True, 8), (False, 1)])
def test_a_bos_is_the_only_first_token_and_a_few_tokens_show_none(adds_bos: bool, samples: int) -> None:
    tokenizer = byte_tokenizer(adds_bos=adds_bos)
    batches = token_batches(tokenizer, DISTINCT * 9, num_samples=samples, seq_len=20)
    assert first_token_batches(tokenizer, batches, vocabulary=99) == []


def test_a_tokenizer_without_special_tokens_shows_those_of_the_text() -> None:
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
    tokenizer.pad_token = "<pad>"  # which it does not know
    (batch,) = first_token_batches(tokenizer, [CalibrationBatch(torch.tensor([[0, 1] * 32]))], vocabulary=2)
    assert batch.input_ids.shape == (2, 2)


def test_batches_are_int64_without_padding() -> None:
    batch = token_batches(byte_tokenizer(), DISTINCT, num_samples=2, seq_len=5, batch_size=2)[0]
    assert batch.input_ids.dtype == torch.int64
    assert batch.attention_mask is None
    assert batch.num_tokens == 10


def test_the_whole_text_can_be_used_and_not_one_token_more() -> None:
    tokenizer = byte_tokenizer()
    samples = rows(token_batches(tokenizer, DISTINCT, num_samples=9, seq_len=10))
    assert sorted(token for sample in samples for token in sample) == sorted(tokenize(tokenizer, DISTINCT).tolist())
    with pytest.raises(CalibrationError, match=r"90 tokens; 10 samples of 10 need 100\..* at most 9 samples, a sh"):
        token_batches(tokenizer, DISTINCT, num_samples=10, seq_len=10)
    with pytest.raises(CalibrationError, match=r"90 tokens; 1 samples of 91 need 91\..* shorter seq_len"):
        token_batches(tokenizer, DISTINCT, num_samples=1, seq_len=91)


@pytest.mark.parametrize("number", ["num_samples", "seq_len", "batch_size"])
def test_impossible_numbers_are_refused(number: str) -> None:
    with pytest.raises(ValueError, match=rf"{number} must be at least \d, got 0"):
        token_batches(byte_tokenizer(), DISTINCT, **{number: 0})


def test_tokens_are_those_of_the_text_without_special_ones_and_without_a_warning(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")  # other tests quieten it
    tokenizer = byte_tokenizer(adds_bos=True)
    text = "The model takes 64 tokens; this is longer. " * 10
    tokens = tokenize(tokenizer, text)
    assert tokens.dtype == torch.int64
    assert tokenizer.decode(tokens) == text
    assert len(tokens) == len(text)
    assert not caplog.records
    tokenizer(text)  # what would have been said
    assert "longer than the specified maximum" in caplog.text


def test_digest_depends_on_every_token() -> None:
    tokens = torch.arange(12).view(2, 6)
    other = tokens.clone()
    other[1, 5] = 99
    assert batches_digest([CalibrationBatch(tokens)]) != batches_digest([CalibrationBatch(other)])


def test_plain_tensors_become_batches() -> None:
    tokens = torch.arange(6).view(2, 3)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    plain, masked = as_batches([tokens, CalibrationBatch(tokens, mask)])
    assert (plain.num_tokens, masked.num_tokens) == (6, 3)
    with pytest.raises(CalibrationError, match="1 calibration batches have no token"):
        as_batches([tokens[:, :1]])


def test_padding_before_tokens_moves_behind_them() -> None:
    # GPT-2 counts positions from the first column.
    model, ids = tiny_model("gpt2"), torch.arange(1, 25).view(2, 12)
    padding = torch.zeros(2, 5, dtype=torch.int64)
    padded = CalibrationBatch(torch.cat([padding, ids], dim=1), torch.cat([padding, ids], dim=1) > 0)
    (batch,) = as_batches([padded])
    assert batch.input_ids[:, :12].equal(ids)
    assert sum_nll(model, [batch]) == pytest.approx(sum_nll(model, [CalibrationBatch(ids)]), rel=1e-5)


def test_a_file_is_read_as_it_is(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text("Grüße\n\nnoch eine Zeile\n", encoding="utf-8")
    assert read_text(str(file)) == read_text(str(file), split="evaluation") == "Grüße\n\nnoch eine Zeile\n"


def test_files_that_are_no_text_are_refused(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes(b"Gr\xfc\xdfe")
    (tmp_path / "empty.txt").write_text(" \n")
    with pytest.raises(CalibrationError, match=r"latin\.txt is not UTF-8 \(byte 2 is 0xfc\); expected a text in UTF-8"):
        read_text(str(tmp_path / "latin.txt"))
    with pytest.raises(CalibrationError, match="has no text"):
        read_text(str(tmp_path / "empty.txt"))
    with pytest.raises(CalibrationError, match=r"wikitext;.* wikitext2, c4"):
        read_text("wikitext")
    with pytest.raises(CalibrationError, match="is a folder; expected a text"):
        read_text(str(tmp_path))


class FakeHub(ModuleType):
    """Stands for the package ``datasets``: remembers what was asked for and how much was read."""

    def __init__(self, error: Exception | None = None) -> None:
        super().__init__("datasets")
        self.__spec__ = sys.__spec__
        self.error = error
        self.asked: dict[str, Any] = {}
        self.read = 0

    def load_dataset(self, path: str, config: str | None, **options: Any) -> Iterator[dict[str, str]]:
        if self.error:
            raise self.error
        self.asked = {"path": path, "config": config, **options}
        return self.rows()

    def rows(self) -> Iterator[dict[str, str]]:
        for i in range(50):
            self.read += 1
            yield {"text": f"document {i:02}"}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub()
    monkeypatch.setitem(sys.modules, "datasets", fake)
    return fake


def test_wikitext_is_read_whole_from_a_part_of_its_own_for_each_purpose(hub: FakeHub) -> None:
    text = read_text("wikitext2", characters=1)
    assert text.startswith("document 00\n\ndocument 01\n\n")
    assert text.endswith("document 49")
    assert (hub.asked["path"], hub.asked["config"]) == ("Salesforce/wikitext", "wikitext-2-raw-v1")
    assert hub.asked["split"] == "train"
    read_text("wikitext2", split="evaluation")
    assert hub.asked["split"] == "test"


def test_c4_is_streamed_only_as_far_as_needed_and_never_the_same_shard_twice(hub: FakeHub) -> None:
    assert read_text("c4", characters=30) == "document 00\n\ndocument 01\n\ndocument 02"
    assert hub.read == 3
    assert hub.asked["streaming"]
    calibration_files = hub.asked["data_files"]
    read_text("c4", split="evaluation", characters=30)
    assert list(calibration_files) == ["train"]
    assert list(hub.asked["data_files"]) == ["validation"]
    assert calibration_files["train"] != hub.asked["data_files"]["validation"]


@pytest.mark.parametrize("error", [ConnectionError, HfHubHTTPError.__bases__[0]], ids=["datasets", "HTTP library"])
def test_a_hub_that_cannot_be_reached_is_said_so(error: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", FakeHub(error("Couldn't reach the Hub")))
    with pytest.raises(CalibrationError, match=r"c4 cannot be fetched .*Couldn't reach the Hub.*'builtin'"):
        read_text("c4")


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calibration, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install datasets\."):
        read_text("wikitext2")
    monkeypatch.setattr(builtin, "find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps exllamav3==1\.6\.5$"):
        read_text("builtin")


def test_the_built_in_text_has_several_kinds_and_its_package_is_not_imported() -> None:
    text = builtin_text("calibration")
    assert text.startswith("2007 European Parliament election in Romania\n\nRomania elected its members")
    for kind in ("MacRumors", "move.w", "MIT License", "a little girl named Lily", "Geese had suffered"):
        assert kind in text, kind
    assert not any(kind in builtin_text("evaluation") for kind in ("move.w", "MIT License"))
    assert "<doc" not in text
    assert "</doc>" not in text
    assert text == read_text("builtin")
    assert "exllamav3" not in sys.modules


def test_the_two_built_in_texts_share_no_paragraph() -> None:
    texts = {split: "\n".join(builtin_kinds(split).values()) for split in ("calibration", "evaluation")}
    long = {split: {line for line in text.split("\n") if len(line) > 200} for split, text in texts.items()}
    assert len(long["evaluation"]) > 900
    assert not long["calibration"] & long["evaluation"]
    assert builtin_text("evaluation") == builtin_kinds("evaluation")["Wikipedia"]


def test_the_built_in_texts_are_long_enough_for_the_paper_setting() -> None:
    sizes: dict[str, int] = {split: len(builtin_text(split)) for split in ("calibration", "evaluation")}
    assert sizes["calibration"] > 512 * 512 * 4.5  # characters per token of English prose, and some
    assert sizes["evaluation"] > 300_000


@pytest.fixture
def large(tmp_path: Path) -> Path:
    """A text of 9 MB: numbered lines of 3-byte characters."""
    path = tmp_path / "large.txt"
    path.write_text("".join(f"{number:06} {'€' * 30}\n" for number in range(92_000)), encoding="utf-8")
    assert path.stat().st_size > calibration.CHARACTERS
    return path


def test_a_large_file_is_read_whole_for_evaluation_in_pieces_of_lines(large: Path) -> None:
    pieces = list(read_pieces(str(large), split="evaluation"))
    assert "".join(pieces) == large.read_text(encoding="utf-8")
    assert all(piece.endswith("\n") and len(piece) < 26_000 for piece in pieces)
    assert list(read_pieces(str(large))) == list(read_pieces(str(large), tokens=10**7)) == pieces


def test_calibration_reads_evenly_spaced_lines_of_a_large_file_and_says_so(large: Path) -> None:
    notes: list[str] = []
    pieces = list(read_pieces(str(large), tokens=1000, notify=notes.append))
    assert notes == ["large.txt has 9.0 MB; 1.0 MB of it are read, in evenly spaced pieces"]
    lines = "".join(pieces).splitlines()
    assert set(lines) <= set(large.read_text(encoding="utf-8").splitlines())
    assert len(set(lines)) == len(lines) == sorted(lines).index(lines[-1]) + 1
    assert (lines[0][:6], lines[-1][:6]) == ("000000", "091999")
    assert 10_000 < len(lines) < 1_000_000 / 98
    assert len(pieces) == 40
    firsts = [int(piece[:6]) for piece in pieces]
    assert max(b - a for a, b in pairwise(firsts)) - min(b - a for a, b in pairwise(firsts)) < 3
    assert pieces == list(read_pieces(str(large), tokens=1000))


def test_tokens_are_counted_in_characters_whatever_the_script(large: Path) -> None:
    text = "".join(read_pieces(str(large), tokens=200_000))
    assert 0.98 * 6 * 200_000 < len(text) < 1.02 * 6 * 200_000


@pytest.mark.parametrize("tokens", [None, 1000])
def test_a_byte_order_mark_is_no_part_of_a_large_text(large: Path, tokens: int | None) -> None:
    plain = next(iter(read_pieces(str(large), tokens=tokens)))
    large.write_text(large.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert next(iter(read_pieces(str(large), tokens=tokens)))[:100] == plain[:100]


@pytest.mark.parametrize("tokens", [None, 1000])
@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_a_large_line_is_cut_between_characters(tmp_path: Path, tokens: int | None, character: str) -> None:
    path = tmp_path / "line.txt"
    path.write_text(character * (8_000_003 // len(character.encode()) + 1), encoding="utf-8")
    text = "".join(read_pieces(str(path), tokens=tokens))
    assert set(text) == {character}
    size = path.stat().st_size if tokens is None else 1_000_000
    assert size - 40 * 6 <= len(text.encode()) <= size


def test_a_large_file_that_is_no_text_is_refused_at_once_or_where_it_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "first").write_bytes(b"\xff" * 8_000_001)
    (tmp_path / "last").write_bytes(b"a" * 8_000_001 + b"\xff")
    (tmp_path / "cut").write_bytes(b"a" * 8_000_001 + "€".encode()[:2])
    for tokens in (1000, None):
        with pytest.raises(
            CalibrationError, match=r"first cannot be read as text \(.*0xff.*; expected a text in UTF-8"
        ):
            read_pieces(str(tmp_path / "first"), tokens=tokens)
    for name in ("last", "cut"):
        pieces = read_pieces(str(tmp_path / name))
        with pytest.raises(CalibrationError, match=f"{name} cannot be read as text"):
            list(pieces)


def test_line_ends_of_a_large_file_are_those_of_a_small_one(tmp_path: Path) -> None:
    (tmp_path / "dos.txt").write_bytes(b"0123456789\r\n" * 700_000)
    assert read_text(str(tmp_path / "dos.txt")) == "0123456789\n" * 700_000
    assert set("".join(read_pieces(str(tmp_path / "dos.txt"), tokens=9)).splitlines()) == {"0123456789"}


def test_pieces_are_tokenized_one_by_one_and_only_as_far_as_needed() -> None:
    tokenizer, read = byte_tokenizer(), []

    def pieces() -> Iterator[str]:
        for piece in ("ab", "", "cd", "ef"):
            read.append(piece)
            yield piece

    assert tokenizer.decode(tokenize(tokenizer, pieces())) == "abcdef"
    read.clear()
    assert tokenizer.decode(tokenize(tokenizer, pieces(), limit=3)) == "abc"
    assert read == ["ab", "", "cd"]
    assert len(tokenize(tokenizer, [])) == 0
    one, many = (token_batches(tokenizer, text, num_samples=2, seq_len=2) for text in ("abcdef", pieces()))
    assert rows(one) == rows(many)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_only_as_much_of_a_large_file_is_read_as_is_needed(tmp_path: Path) -> None:
    path = tmp_path / "sparse.txt"
    with path.open("wb") as file:
        file.truncate(10**12)
    before = read_bytes()
    batches = token_batches(byte_tokenizer(), read_pieces(str(path), tokens=1), num_samples=2, seq_len=64)
    assert rows(batches) == 2 * [64 * [rows(batches)[0][0]]]
    assert len(tokenize(byte_tokenizer(), read_pieces(str(path), split="evaluation"), limit=100)) == 100
    assert read_bytes() - before < 4_000_000


def read_bytes() -> int:
    """Bytes that this process has read from files."""
    return int(Path("/proc/self/io").read_text().split()[1])
