from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import typer

from benchmarks.compression.output import saved


@dataclass
class Number:
    value: int


def interrupted() -> Iterator[Number]:
    yield Number(1)
    raise KeyboardInterrupt


def test_results_before_an_interruption_are_in_the_file(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(saved(interrupted(), tmp_path / "numbers.jsonl"))
    assert json.loads((tmp_path / "numbers.jsonl").read_text()) == {"value": 1}
    assert list(saved([Number(2)], None)) == [Number(2)]


def test_a_file_that_cannot_be_written_is_refused_before_the_first_result(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match="there is no folder"):
        next(saved(interrupted(), tmp_path / "absent" / "numbers.jsonl"))
