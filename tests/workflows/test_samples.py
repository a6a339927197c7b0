from __future__ import annotations

from pathlib import Path

import pytest

from grasp import calibration
from grasp.workflows.samples import Samples, draw, read_for
from tests.tiny_tokenizers import byte_tokenizer


def test_a_large_file_is_read_far_enough_for_sequences_to_hold_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "CHARACTERS", 10_000)
    monkeypatch.setattr(calibration, "_LEAST", 1)
    monkeypatch.setattr(calibration, "_CHARACTERS_PER_TOKEN", 1)  # as the tokenizer here has
    path, notes = tmp_path / "large.txt", list[str]()
    path.write_text("The quick brown fox jumps over the lazy dog.\n" * 40_000)
    samples = Samples(str(path), num_samples=4096, seq_len=64)
    drawn, held_out = draw(byte_tokenizer(), read_for(samples, notes.append), samples, notes.append)
    assert (len(drawn), len(held_out)) == (4096, 512)
    assert len(notes) == 1
    assert "are read, in evenly spaced pieces" in notes[0]


def test_a_text_without_room_for_held_out_sequences_is_reported() -> None:
    notes: list[str] = []
    for size in (600, 450):
        samples = Samples("text", num_samples=40, seq_len=10)
        draw(byte_tokenizer(), "0123456789" * (size // 10), samples, notes.append)
    assert "the text has room for 0 of 5 held-out sequences beside 40 that it is calibrated on, so no" in notes[-1]
