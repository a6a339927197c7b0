from __future__ import annotations

import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from grasp import files
from grasp.errors import GraspError, OccupiedError
from grasp.files import Contents, contents, in_use, remove_abandoned, replacing, require_writable, write_whole


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


def test_a_temporary_that_another_process_writes_is_left(tmp_path: Path) -> None:
    folder = tmp_path / ".out.12345678.partial"
    folder.mkdir()
    code = "import sys; from pathlib import Path; from grasp.files import remove_abandoned as r; r(Path(sys.argv[1]))"
    other = [sys.executable, "-c", code, str(tmp_path / "out")]
    with in_use(folder):
        subprocess.run(other, check=True)
        assert folder.is_dir()
    subprocess.run(other, check=True)
    assert not folder.exists()


def tree(folder: Path) -> dict[str, str]:
    """Files below a folder with their texts."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("kind", ["file.json", "folder-3.1"])
@pytest.mark.parametrize("former", [False, True])
def test_a_file_that_appears_meanwhile_stays_beside_the_result(tmp_path: Path, kind: str, former: bool) -> None:
    target, is_folder = tmp_path / kind, kind.startswith("folder")
    inside = (lambda path: path / "a/b") if is_folder else (lambda path: path)

    def put(path: Path, text: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def write(text: str, seen: Contents, meanwhile: Path) -> None:
        with replacing(target, seen=seen) as temporary:
            put(inside(temporary), text)
            put(meanwhile, "somebody's")

    if former:
        put(inside(target), "former")
    theirs = (target / "a/theirs") if is_folder else target
    before = contents(target)
    with pytest.raises(OccupiedError, match=f"{re.escape(kind[:4])}.*-2") as caught:
        write("new", before, theirs)
    second = tmp_path / ("folder-3.1-2" if is_folder else "file-2.json")
    assert str(second) in str(caught.value)
    expected = {str(theirs.relative_to(tmp_path)): "somebody's", str(inside(second).relative_to(tmp_path)): "new"}
    if former and is_folder:
        expected[f"{kind}/a/b"] = "former"
    assert tree(tmp_path) == expected

    write("newer", contents(target), tmp_path / "elsewhere")  # what was seen is replaced
    assert inside(target).read_text() == "newer"
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([kind, second.name, "elsewhere"])


@pytest.mark.parametrize("is_folder", [False, True])
def test_all_of_several_writers_keep_their_results(tmp_path: Path, is_folder: bool) -> None:
    target, writers = tmp_path / "out", 8
    barrier = Barrier(writers)

    def write(number: int) -> bool:
        try:
            with replacing(target, seen={}) as temporary:
                if is_folder:
                    temporary.mkdir()
                (temporary / "text" if is_folder else temporary).write_text(str(number))
                barrier.wait()
        except OccupiedError:
            return False
        return True

    with ThreadPoolExecutor(writers) as pool:
        winners = list(pool.map(write, range(writers)))
    assert sum(winners) == 1
    assert sorted(tree(tmp_path).values()) == sorted(map(str, range(writers)))
    assert len(list(tmp_path.iterdir())) == writers
    assert next(iter(tree(target).values()) if is_folder else iter([target.read_text()])) == str(winners.index(True))


@pytest.mark.parametrize("bad", ["a folder", "a device", "no folder", "a file as folder", "a long name", "no access"])
def test_an_output_that_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").touch()
    output = {
        "a folder": tmp_path,
        "a device": Path("/dev/null"),
        "no folder": tmp_path / "missing/file",
        "a file as folder": tmp_path / "file/file",
        "a long name": tmp_path / ("x" * 250),
        "no access": Path("/proc/1/file"),
    }[bad]
    with pytest.raises(GraspError, match=re.escape(str(output))):
        require_writable(output)
    require_writable(tmp_path / "missing/file", parents=True)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("in_one_step", [True, False])
def test_folders_swap_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_one_step: bool) -> None:
    if not in_one_step:
        monkeypatch.setattr(files.sys, "platform", "another")
    target = tmp_path / "out"
    for text in ("former", "new"):
        before = contents(target)
        with replacing(target, seen=before) as temporary:
            temporary.mkdir()
            (temporary / text).write_text(text)
    assert tree(tmp_path) == {"out/new": "new"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
