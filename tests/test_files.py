from __future__ import annotations

from pathlib import Path

import pytest

from grasp.errors import GraspError
from grasp.files import remove_abandoned, replacing, write_whole


def test_a_text_or_bytes_replace_a_file(tmp_path: Path) -> None:
    file = tmp_path / "new/file.txt"
    write_whole(file, "Grüße\n")
    assert file.read_bytes() == "Grüße\n".encode()
    write_whole(file, b"\xff")
    assert file.read_bytes() == b"\xff"
    assert list(tmp_path.rglob("*")) == [file.parent, file]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_block_that_fails_changes_nothing(tmp_path: Path, kind: str, error: type[BaseException]) -> None:
    def fail() -> None:
        with replacing(tmp_path / "a/b/new") as temporary:
            temporary.mkdir() if kind == "folder" else temporary.write_text("half")
            raise error

    with pytest.raises(error):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(GraspError, match=r"file/new\.txt"):
        write_whole(tmp_path / "file/new.txt", "")


def test_a_temporary_may_lie_in_another_folder(tmp_path: Path) -> None:
    (tmp_path / "scratch").mkdir()
    with replacing(tmp_path / "file", scratch=tmp_path / "scratch") as temporary:
        assert temporary.parent == tmp_path / "scratch"
        temporary.write_text("new")
    assert (tmp_path / "file").read_text() == "new"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    keep = {"out[1]", "out[1].partial", ".out[1].partial", ".out1.12345678.partial", ".out[1].12345678.old"}
    for name in (*keep, ".out[1].12345678.partial", ".out[1].abcdef09.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"half")
    remove_abandoned(tmp_path / "out[1]")
    assert {path.name for path in tmp_path.iterdir()} == keep
