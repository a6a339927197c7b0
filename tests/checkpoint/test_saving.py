from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

from grasp.checkpoint.saving import check_directory, read_texts, save_checkpoint
from grasp.errors import CheckpointError, OccupiedError
from grasp.model.lowrank_linear import LowRankLinear
from tests.tiny_models import tiny_model

UP = "model.layers.1.mlp.up_proj"


@pytest.fixture
def model() -> PreTrainedModel:
    """One layer low-rank, and not marked as compressed."""
    model = tiny_model("llama")
    model.set_submodule(UP, LowRankLinear.from_dense(model.get_submodule(UP), torch.arange(4)))
    return model


WRITTEN = ["out", "out/config.json", "out/generation_config.json", "out/model.safetensors"]


def everything_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_writes_model_tokenizer_card_and_extra_files(model: PreTrainedModel, tmp_path: Path) -> None:
    words = Tokenizer(WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    folder = save_checkpoint(
        model, tmp_path / "new/out", tokenizer=tokenizer, card="# Überschrift\n", extra_files={"report.json": "{}"}
    )
    assert folder == (tmp_path / "new/out").resolve()
    assert everything_in(tmp_path / "new") == [
        "out",
        "out/README.md",
        "out/config.json",
        "out/generation_config.json",
        "out/model.safetensors",
        "out/report.json",
        "out/tokenizer.json",
        "out/tokenizer_config.json",
    ]
    assert (folder / "README.md").read_text(encoding="utf-8") == "# Überschrift\n"
    assert AutoTokenizer.from_pretrained(folder)("b").input_ids == [1]
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(loaded.get_submodule(UP), LowRankLinear)
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    assert (folder / "model.safetensors").stat().st_mode == (folder / "config.json").stat().st_mode
    assert folder.stat().st_mode == tmp_path.joinpath("new").stat().st_mode  # as readable as any new folder


def test_an_empty_folder_is_filled(model: PreTrainedModel, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    save_checkpoint(model, target)
    assert everything_in(tmp_path) == WRITTEN


def test_a_folder_that_is_not_empty_is_refused_before_any_work(model: PreTrainedModel, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match=r"is not empty.* 1 .*notes\.txt"):
        save_checkpoint(model, tmp_path)
    assert everything_in(tmp_path) == ["notes.txt"]
    assert not hasattr(model, "hf_quantizer")


def test_a_checkpoint_is_replaced_where_asked_and_anything_else_is_not(model: PreTrainedModel, tmp_path: Path) -> None:
    target = tmp_path / "out"
    save_checkpoint(model, target, extra_files={"old.txt": ""})
    save_checkpoint(model, target, overwrite=True)
    assert everything_in(tmp_path) == WRITTEN
    (target / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        save_checkpoint(model, target, overwrite=True)


def test_a_file_a_mount_point_and_the_current_directory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        check_directory(tmp_path / "file")
    monkeypatch.chdir(tmp_path)
    for folder in (".", "/proc"):
        with pytest.raises(CheckpointError, match="current directory or a mount point"):
            check_directory(folder)


def test_a_place_that_cannot_be_written_to_is_refused(tmp_path: Path) -> None:
    for name in ("/proc/1/new/out", tmp_path / ("x" * 250)):
        with pytest.raises(CheckpointError, match="cannot be created"):
            check_directory(name)


def test_checking_creates_nothing(tmp_path: Path) -> None:
    assert check_directory(tmp_path / "a/b") == (tmp_path / "a/b").resolve()
    assert everything_in(tmp_path) == []


def test_too_little_space_is_refused_before_anything_is_written(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    needed = model.get_memory_footprint() + 64 * 2**20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    with pytest.raises(CheckpointError, match=r"needs 0\.07 GB, 0\.07 GB are free"):
        save_checkpoint(model, tmp_path / "new/out")
    assert everything_in(tmp_path) == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed))
    save_checkpoint(model, tmp_path / "new/out")


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (KeyboardInterrupt(), KeyboardInterrupt),
        (OSError(28, "No space left on device"), CheckpointError),
        (SafetensorError("No space left on device"), CheckpointError),
        (Exception("No space left on device"), CheckpointError),  # as tokenizers raises it
        (RuntimeError("of another kind"), RuntimeError),
    ],
)
@pytest.mark.parametrize("existing", [False, True])
def test_a_failure_in_the_middle_leaves_what_was_there(
    model: PreTrainedModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    raised: type[BaseException],
    existing: bool,
) -> None:
    target = tmp_path / "new/out"
    if existing:
        save_checkpoint(model, target)
    before = everything_in(tmp_path)
    save = model.save_pretrained

    def save_and_fail(folder: Path) -> NoReturn:
        save(folder)
        raise error

    monkeypatch.setattr(model, "save_pretrained", save_and_fail)
    with pytest.raises(raised) as caught:
        save_checkpoint(model, target, overwrite=True)
    if raised is CheckpointError:
        assert "as it was before" in str(caught.value)
        assert "No space left on device" in str(caught.value)
    assert everything_in(tmp_path) == before


def test_a_failure_at_the_very_end_puts_the_old_checkpoint_back(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = save_checkpoint(model, tmp_path / "out", extra_files={"old.txt": "kept"})
    before = everything_in(tmp_path)

    def fail(new: Path, target: Path) -> NoReturn:
        raise OSError("interrupted")

    monkeypatch.setattr("grasp.files._move", fail)
    with pytest.raises(CheckpointError, match="interrupted"):
        save_checkpoint(model, target, overwrite=True)
    assert everything_in(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "../up.txt", "sub/report.json", ""])
def test_extra_files_cannot_leave_the_folder_or_replace_the_models(
    model: PreTrainedModel, tmp_path: Path, name: str
) -> None:
    with pytest.raises(ValueError, match="must be a plain name"):
        save_checkpoint(model, tmp_path / "out", extra_files={name: "x"})
    assert everything_in(tmp_path) == []


def test_an_ordinary_model_is_saved_as_one(tmp_path: Path) -> None:
    folder = save_checkpoint(tiny_model("llama"), tmp_path / "out")
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config


@pytest.mark.parametrize("former", [False, True])
def test_a_file_that_is_put_into_the_folder_while_saving_stays(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, former: bool
) -> None:
    target = tmp_path / "out"
    if former:
        save_checkpoint(model, target)
    save = model.save_pretrained

    def save_and_put(folder: Path) -> None:
        save(folder)
        target.mkdir(exist_ok=True)
        (target / "notes.txt").write_text("mine")

    monkeypatch.setattr(model, "save_pretrained", save_and_put)
    with pytest.raises(OccupiedError, match=str(tmp_path / "out-2")):
        save_checkpoint(model, target, overwrite=former)
    assert (target / "notes.txt").read_text() == "mine"
    names = [path.removeprefix("out") for path in WRITTEN]
    kept = [f"out{name}" for name in names] if former else ["out"]
    assert everything_in(tmp_path) == sorted([*kept, "out/notes.txt", *(f"out-2{name}" for name in names)])


def test_a_checkpoint_that_was_checked_before_long_work_is_not_checked_again(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    target = check_directory(tmp_path / "out")
    target.mkdir()
    (target / "notes.txt").write_text("put there in the meantime")
    with pytest.raises(OccupiedError, match="out-2"):
        save_checkpoint(model, target, seen={})
    assert (tmp_path / "out-2/config.json").exists()


def test_texts_are_taken_over_but_not_through_a_link_to_another_folder(tmp_path: Path) -> None:
    folder = tmp_path / "models--owner--name" / "snapshots" / "1"
    blobs = folder.parent.parent / "blobs"
    for place in (folder, blobs):
        place.mkdir(parents=True)
    (folder / "LICENSE.txt").write_text("mine")
    (blobs / "0").write_text("a card")
    (folder / "README.md").symlink_to("../../blobs/0")  # as the hub's cache has it
    texts = ("README.md", "LICENSE*", "report.json")
    assert read_texts(folder, texts) == {"README.md": "a card", "LICENSE.txt": "mine"}
    (tmp_path / "private").write_text("a secret")
    (folder / "report.json").symlink_to("../../../private")
    with pytest.raises(CheckpointError, match=r"report\.json is a link that leads out of its folder"):
        read_texts(folder, texts)
