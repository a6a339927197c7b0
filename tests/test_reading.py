from __future__ import annotations

import json
import os
import socket
import sys
from pathlib import Path

import pytest

from grasp import reading
from grasp.errors import GraspError, ResultsError
from grasp.reading import LIMIT, open_regular, parse_json, read_json, read_lines, read_text_file

WANTED = "a file of results; measure again"


def special_file(folder: Path, kind: str) -> Path:
    path = folder / kind
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "dangling":
        path.symlink_to(folder / "nowhere")
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "sparse":
        with path.open("wb") as file:
            file.truncate(2**40)
    elif kind != "missing":
        return Path("/dev", kind)
    return path


KINDS = ("fifo", "loop", "folder", "dangling", "link to a device", "socket", "missing", "zero", "full", "null", "tty")


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files_are_opened(tmp_path: Path, kind: str) -> None:
    path = special_file(tmp_path, kind)
    before = len(os.listdir("/proc/self/fd")) if sys.platform == "linux" else 0
    for read in (open_regular, read_text_file, read_json, lambda *given: list(read_lines(*given))):
        with pytest.raises(ResultsError) as raised:
            read(path, WANTED, ResultsError)
        message = str(raised.value)
        assert str(path) in message
        assert message.endswith(f"; expected {WANTED}")
        assert "\n" not in message
    if before:
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_link_to_a_regular_file_is_followed(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes("é\r\nb\rc\n".encode())
    (tmp_path / "link").symlink_to("text")
    assert read_text_file(tmp_path / "link", WANTED) == (tmp_path / "text").read_text(encoding="utf-8") == "é\nb\nc\n"


def test_a_path_with_a_nul_character_is_refused() -> None:
    with pytest.raises(GraspError, match="cannot be read"):
        open_regular("a\0b", WANTED)


def test_a_large_file_is_refused_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = special_file(tmp_path, "sparse")
    for read in (read_text_file, read_json, lambda *given: list(read_lines(*given))):
        with pytest.raises(GraspError, match=r"has more than 64\.0 MB; expected"):
            read(path, WANTED)
    (tmp_path / "text").write_text("abcd")
    monkeypatch.setattr(reading, "LIMIT", 4)
    assert read_text_file(tmp_path / "text", WANTED) == "abcd"
    monkeypatch.setattr(reading, "LIMIT", 3)
    with pytest.raises(GraspError, match="has more than 3 B"):
        read_text_file(tmp_path / "text", WANTED)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_error_while_reading_is_refused() -> None:
    for read in (read_text_file, lambda *given: list(read_lines(*given))):
        with pytest.raises(GraspError, match=r"/proc/self/mem cannot be read \("):
            read("/proc/self/mem", WANTED)


def test_lines_keep_their_numbers_and_need_no_final_newline(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_bytes("a\u2028\r\n \n\nb".encode())
    assert list(read_lines(path, WANTED)) == [(1, "a\u2028"), (4, "b")]
    path.write_text("\ufeffa\n\ufeffb", encoding="utf-8")  # a mark at the beginning is no part of the text
    assert list(read_lines(path, WANTED)) == [(1, "a"), (2, "\ufeffb")]
    assert read_text_file(path, WANTED) == "a\n\ufeffb"
    path.write_bytes(b"a\n\xff\n")
    with pytest.raises(GraspError, match=r"line 2 of .* is not UTF-8"):
        list(read_lines(path, WANTED))


NOT_JSON = {
    "empty": "",
    "NUL": '{"a": "\0"}',
    "nested lists": '{"a": ' + 101 * "[" + 101 * "]" + "}",
    "nested objects": 200_000 * '{"a":',
    "closed nested objects": 200_000 * '{"a":' + "1" + 200_000 * "}",
    "number of 400 digits": '{"a": ' + 400 * "9" + "}",
    "number of 5000 digits": '{"a": -' + 5000 * "9" + "}",
    "large exponent": '{"a": 1e400}',
    "NaN": '{"a": NaN}',
    "infinity": '{"a": -Infinity}',
    "lone surrogate": '{"a": "\\uD800"}',
    "lone surrogate as key": '{"\\udc00": 1}',
    "list": "[]",
    "string": '"a"',
    "null": "null",
    "two objects": "{}{}",
}


@pytest.mark.parametrize("text", NOT_JSON.values(), ids=NOT_JSON)
def test_unusable_json_is_refused_in_one_line(tmp_path: Path, text: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ResultsError) as raised:
        read_json(path, WANTED, ResultsError)
    message = str(raised.value)
    assert message.startswith(str(path))
    assert message.endswith(f"; expected {WANTED}")
    assert len(message.splitlines()) == 1
    assert len(message) < len(str(path)) + 250


def test_usable_json_is_read_as_the_standard_library_reads_it(tmp_path: Path) -> None:
    values = {"a": [1, -2.5, 1e300, 10**300, True, None, "\0é😀"], "b": {"": json.loads(98 * "[" + 98 * "]")}}
    text = json.dumps(values)
    (tmp_path / "values.json").write_text(text)
    assert read_json(tmp_path / "values.json", WANTED) == parse_json(text, "it", WANTED) == json.loads(text) == values


def test_infinity_is_read_where_transformers_writes_it() -> None:
    assert parse_json('{"time_step_limit": [0.0, Infinity]}', "it", WANTED, finite=False)["time_step_limit"][1] > 1e308


def test_the_limit_holds_a_report_of_the_largest_models() -> None:
    assert LIMIT > 126 * 7 * 8192 * 6  # indices of all modules of 405 B parameters, with digits and a separator
