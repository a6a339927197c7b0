from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from grasp.cli.console import StepBars, print_facts, print_json, print_line, print_table, print_text
from grasp.formatting import count, layer_ranges, printable, share, size
from grasp.progress import TimeLeft


@pytest.mark.parametrize(
    ("layers", "text"),
    [((), ""), ((3,), "3"), ((3, 4), "3, 4"), ((3, 12, 13, 14, 15, 17), "3, 12-15, 17"), ((0, 1, 2), "0-2")],
)
def test_layers_are_drawn_together(layers: tuple[int, ...], text: str) -> None:
    assert layer_ranges(layers) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (999, "999"), (1000, "1.0 K"), (134_515_008, "134.5 M"), (999_960, "1.0 M"), (8.03e9, "8.0 B")],
)
def test_counts_have_one_decimal_and_a_unit(value: float, text: str) -> None:
    assert count(value) == text


def test_sizes_are_decimal_bytes_and_shares_are_per_cent() -> None:
    assert size(538_060_032) == "538.1 MB"
    assert size(12) == "12 B"
    assert size(3.2e15) == "3200.0 TB"
    assert share(0.1579) == "15.8 %"


def test_json_has_null_for_what_is_not_finite(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5, (float("inf"),)], "b": True, "c": None, "d": "nan"})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5, [None]], "b": True, "c": None, "d": "nan"}


@pytest.mark.parametrize("width", [80, 120])
def test_tables_keep_numbers_on_one_line(
    width: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    print_table(("", "parameters", "bytes"), [("layers removed", "113.3 M", "453.1 MB")], title="Sizes")
    print_facts([("checkpoint", "/somewhere/" + "deep/" * 40)])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split() == ["layers", "removed", "113.3", "M", "453.1", "MB"] for line in lines)
    assert max(map(len, lines)) <= width


def test_no_number_or_name_is_cut_on_a_narrow_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "30")
    print_table(("part", "parameters", "bytes"), [("layers removed", "113.3 M", "453.1 MB"), ("x" * 20, "1", "2")])
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["part", "parameters", "bytes"] in lines
    assert ["layers", "removed", "113.3", "M", "453.1", "MB"] in lines
    assert lines[-2:] == [["x" * 16, "1", "2"], ["x" * 4]]


def test_facts_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    print_facts([("form", ""), ("time", "1 s")])
    assert capsys.readouterr().out.split() == ["time", "1", "s"]


def bars(*, terminal: bool) -> tuple[StepBars, io.StringIO]:
    stream = io.StringIO()
    return StepBars(Console(file=stream, force_terminal=terminal, force_interactive=terminal, width=80)), stream


def test_a_step_that_ends_early_leaves_no_line_on_the_terminal() -> None:
    progress, stream = bars(terminal=True)
    progress("loading " + "x" * 200, 0, 1)
    assert "\n" not in stream.getvalue()
    progress.close()
    assert stream.getvalue().endswith("\x1b[2K")


def test_without_a_terminal_each_finished_step_is_one_line() -> None:
    progress, stream = bars(terminal=False)
    for step, total in (("loading", 1), ("layer 3 mlp", 2), ("layer 3 attention", 2)):
        for done in range(total + 1):
            progress(step, done, total)
    steps = [line.rsplit(maxsplit=2)[0].strip() for line in stream.getvalue().splitlines()]
    assert steps == ["loading", "layer 3 mlp", "layer 3 attention"]


def test_on_a_terminal_a_running_step_has_a_bar_that_goes_away() -> None:
    progress, stream = bars(terminal=True)
    progress("layer 3 mlp", 1, 4)
    assert progress._bars is not None
    progress._bars.refresh()
    assert "1/4" in stream.getvalue()
    assert "left" in stream.getvalue()
    progress("layer 3 mlp", 4, 4)
    assert progress._bars is None
    assert stream.getvalue().rstrip().endswith(" s")


def test_a_step_that_ends_early_gives_way_to_the_next() -> None:
    progress, _ = bars(terminal=True)
    progress("prefix", 1, 4)
    first = progress._bars
    progress("layer 3 mlp", 1, 4)
    assert first is not None
    assert first.live.is_started is False
    assert progress._bars is not first
    progress.close()


def test_the_whole_job_has_a_time_left_that_follows_the_pace() -> None:
    left = TimeLeft({"sums": 30.0, "refit": 10.0}, {"sums": 2})
    assert left.after("sums, 3 layers", 1, 2, now=5.0) == pytest.approx(32.5)  # as expected
    assert left.after("sums, 3 layers", 2, 2, now=20.0) == pytest.approx(50.0)  # twice as slow
    assert left.after("sums, layer 1", 2, 2, now=50.0) == pytest.approx(20.0)
    assert left.after("unexpected", 1, 2, now=50.0) == pytest.approx(20.0)
    assert left.after("refit", 3, 3, now=60.0) == 0


def test_on_a_terminal_bars_have_the_time_left_of_the_whole_job() -> None:
    progress, stream = bars(terminal=True)
    progress.expect(TimeLeft({"sums": 7200.0, "refit": 7200.0}))
    progress("sums", 1, 4)
    assert progress._bars is not None
    progress._bars.refresh()
    assert "(3.5 h in all)" in stream.getvalue()
    progress.close()


def test_the_times_of_steps_that_take_turns_are_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(10))
    monkeypatch.setattr("grasp.cli.console.time.perf_counter", lambda: float(next(clock)))
    progress, stream = bars(terminal=False)
    for step, done in (("sums", 1), ("svd", 1), ("sums", 2), ("svd", 2)):
        progress(step, done, 2)
    assert [line.split() for line in stream.getvalue().splitlines()] == [["sums", "2.0", "s"], ["svd", "2.0", "s"]]


def test_a_note_is_one_line_whatever_its_length_and_characters() -> None:
    for terminal in (False, True):
        progress, stream = bars(terminal=terminal)
        progress("prefix", 1, 4)
        progress.note("[0, 2] of " + "/somewhere" * 20)
        progress.close()
        assert "[0, 2] of " + "/somewhere" * 20 + "\n" in stream.getvalue()


HOSTILE = "[/b][red]:bomb:\x1b]0;title\x07\u202e\x9b31m\udc80\r[link=file:///x]"


def test_names_are_shown_as_they_are_without_markup_emoji_or_control_characters(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    shown = printable(HOSTILE)
    assert shown.isprintable()
    print_table((HOSTILE, HOSTILE), [(HOSTILE, HOSTILE)], title=HOSTILE)
    print_facts([(HOSTILE, HOSTILE)], title=HOSTILE)
    print_text(HOSTILE)
    print_line(HOSTILE)
    out = capsys.readouterr().out
    assert out.replace("\n", "").isprintable()
    assert out.count(shown) == 10


@pytest.mark.parametrize("terminal", [False, True])
def test_steps_and_notes_are_shown_as_they_are_too(terminal: bool) -> None:
    progress, stream = bars(terminal=terminal)
    for done in range(3):
        progress(HOSTILE, done, 2)
        if progress._bars is not None:
            progress._bars.refresh()
    progress.note(HOSTILE)
    own = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r|\n", "", stream.getvalue())  # rich's colours and cursor movements
    assert own.isprintable()
    assert own.count(printable(HOSTILE)) >= 2
