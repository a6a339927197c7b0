from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants

from grasp.checkpoint.push import push as upload
from grasp.checkpoint.push import require_complete
from grasp.errors import CheckpointError, HubError
from grasp.model.hf_quantizer import mark_compressed
from grasp.model.lowrank_linear import LowRankLinear
from grasp.reporting import card_figure
from tests.command_line import RunMain, environment, main, save_tiny_model
from tests.fake_hub import TOKEN, FakeHub, fake_hub
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

__all__ = ["main"]
SECRET = TOKEN.removeprefix("hf_")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of ``save_pretrained`` in two shards, without model card and report."""
    folder = tmp_path_factory.mktemp("models") / "small"
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    mark_compressed(model)
    model.save_pretrained(folder, max_shard_size="60KB")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "small"))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as started:
        yield started


@pytest.fixture
def online(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    """The hub of this process, which has a token for it."""
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    return hub


def push(folder: Path, *arguments: str, endpoint: str, token: str | None = TOKEN) -> subprocess.CompletedProcess[str]:
    home = folder.parent / "home"
    home.mkdir(exist_ok=True)
    variables = {name: value for name, value in environment().items() if not name.startswith("HF_")}
    variables |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    if token is not None:
        variables["HF_TOKEN"] = token
    run = subprocess.run(
        [sys.executable, "-m", "grasp", "push", str(folder), *arguments],
        cwd=folder.parent,
        env=variables,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert SECRET not in run.stdout + run.stderr
    for file in folder.parent.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes()
    return run


@pytest.mark.slow
def test_a_folder_arrives_whole_without_what_is_unfinished_or_hidden_and_again_only_what_is_new(
    folder: Path, online: FakeHub, main: RunMain
) -> None:
    for name in ("notes.partial", ".env", "old.partial/weights.safetensors", "additional_chat_templates/.hidden"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("not for others")
    expected = {path.name for path in folder.iterdir() if path.is_file() and path.name not in ("notes.partial", ".env")}
    assert sum(name.endswith(".safetensors") for name in expected) > 1
    run = push(folder, "someone/small", "--private", "--json", endpoint=online.address)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"repository": f"{online.address}/someone/small"}
    assert online.repositories == {"someone/small": "private"}
    assert online.files.keys() == expected | {"README.md"}
    assert all(online.files[name] == (folder / name).read_bytes() for name in online.files)
    assert ModelCard(online.files["README.md"].decode()).data.library_name == "transformers"

    sent = list(online.uploads)
    stale = ("model.safetensors", "recovery.json", "vocab.txt", "additional_chat_templates/tools.jinja")
    staying = ("model-onnx/model.safetensors", "LICENSE.txt", "notes.md")
    online.files |= dict.fromkeys((*stale, *staying), b"earlier")
    (folder / "README.md").write_text("---\ntags: [mine]\n---\n# Mine\n")
    again = main("push", folder, "someone/small", "--private")
    assert again.code == 0, again.err
    assert online.uploads == sent
    assert online.files.keys() == expected | {"README.md", *staying}
    assert online.files["README.md"] == b"---\ntags: [mine]\n---\n# Mine\n"
    assert online.repositories == {"someone/small": "private"}


def test_after_a_failure_the_same_command_sends_only_what_is_missing(
    folder: Path, online: FakeHub, main: RunMain
) -> None:
    online.refuse_commits = 1
    failed = main("push", folder, "someone/small")
    assert failed.code == 2
    assert "run the same command again" in failed.err.splitlines()[-1]
    assert "Traceback" not in failed.err
    sent = list(online.uploads)
    assert sent
    assert not online.files
    again = main("push", folder, "someone/small")
    assert again.code == 0, again.err
    assert online.uploads == sent
    assert {"config.json", "README.md"} <= online.files.keys()


@pytest.mark.parametrize(
    ("name", "token", "reachable", "words"),
    [
        ("someone/small", None, True, ["no token for the hub", "hf auth login", "HF_TOKEN"]),
        ("someone/small", f"{TOKEN}Wrong", True, ["401", "the token is not valid"]),
        ("somebody-else/small", TOKEN, True, ["403", "write access"]),
        ("no name/at all", TOKEN, True, ["no name/at all", "owner/name"]),
        ("someone/small", TOKEN, False, ["failed", "run the same command again"]),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_remedy(
    name: str,
    token: str | None,
    reachable: bool,
    words: list[str],
    folder: Path,
    hub: FakeHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", hub.address if reachable else "http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(HubError) as refused:
        upload(folder, name)
    assert SECRET not in str(refused.value)
    for word in words:
        assert word in str(refused.value)
    assert not hub.files


def test_a_repository_that_is_public_is_not_taken_for_a_private_one(folder: Path, online: FakeHub) -> None:
    online.repositories = {"someone/public": "public"}
    with pytest.raises(HubError, match=r"someone/public.* public"):
        upload(folder, "someone/public", private=True)
    assert not online.files


ENCODED_TOKENS = [
    *(TOKEN, TOKEN[:9], TOKEN[9:], TOKEN.upper(), TOKEN.encode().hex(), TOKEN[::-1]),
    base64.b64encode(TOKEN.encode()).decode(),
    "".join(f"%{ord(letter):02X}" for letter in TOKEN),
]


def test_no_text_of_the_server_is_shown_for_it_may_repeat_the_token(
    folder: Path,
    online: FakeHub,
    capfd: pytest.CaptureFixture[str],
    recwarn: pytest.WarningsRecorder,
    caplog: pytest.LogCaptureFixture,
) -> None:
    online.echo = "\n".join(ENCODED_TOKENS)
    messages = []
    for online.echo_at in ("/repos/create", "/api/models/someone/small", "validate-yaml", "/preupload/", "/commit/"):
        with pytest.raises(HubError, match=r"failed \(.*; run the same command again") as refused:
            upload(folder, "someone/small")
        messages.append("".join(traceback.format_exception(refused.value)))
    online.echo_at = "nowhere"
    messages.append(upload(folder, "someone/small"))
    assert messages[-1] == f"{online.address}/someone/small"
    out, err = capfd.readouterr()
    shown = "".join([out, err, caplog.text, *messages, *(str(warning.message) for warning in recwarn)])
    assert [part for part in ENCODED_TOKENS if part in shown] == []


@pytest.mark.parametrize("answer", [{}, [], {"url": 3}, {"url": None, "private": "x"}])
def test_a_server_that_is_no_hub_gets_one_line(answer: object, folder: Path, online: FakeHub) -> None:
    online.answer = answer
    with pytest.raises(HubError, match=r"uploading to someone/small on .* failed \("):
        upload(folder, "someone/small")


def break_index(folder: Path) -> None:
    next(folder.glob("model-00001-*.safetensors")).unlink()


def cut_weights(folder: Path) -> None:
    file = next(folder.glob("model-00001-*.safetensors"))
    os.truncate(file, file.stat().st_size - 100)


def write(file: Path) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text("{}")


def link(file: Path) -> None:
    """Move a file out of its folder, and put a link in its place."""
    other = file.parent.parent / "elsewhere"
    if file.exists():
        file.rename(other)
    file.symlink_to(other)


def drop_tokenizer(folder: Path) -> None:
    for file in folder.glob("*token*"):
        file.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda folder: (folder / "config.json").unlink(), r"no file .*config\.json"),
        (break_index, "lacks 1 of|is missing"),
        (cut_weights, "cannot be read"),
        (drop_tokenizer, "has no tokenizer"),
        *[
            (lambda folder, name=name: write(folder / name), rf"{name.partition('/')[0]} is no part of a checkpoint")
            for name in (
                *("pytorch_model.bin", "Optimizer.PT", "modeling.py", "data.npy", "key.pem", "credentials.json"),
                *("CONFIG.JSON", "other.safetensors", "model.gguf", "notes.txt", "report.html", "sub/config.json"),
            )
        ],
        (lambda folder: write(folder / "additional_chat_templates/tool.py"), "tool.py is no part of a checkpoint"),
        *[
            (lambda folder, name=name: link(folder / name), f"{name} is a link that leads out")
            for name in ("config.json", "LICENSE")
        ],
        (lambda folder: link(next(folder.glob("model-00001-*"))), "is a link that leads out"),
        (
            lambda folder: (folder / "additional_chat_templates").symlink_to(folder.parent),
            "additional_chat_templates is a link that leads out",
        ),
        (lambda folder: (folder / "LICENSE").symlink_to("README.md"), "LICENSE is a link or no file"),
        (lambda folder: os.mkfifo(folder / "NOTICE"), "NOTICE is a link or no file"),
        (lambda folder: shutil.rmtree(folder), "no folder"),
    ],
)
def test_a_folder_that_is_no_whole_checkpoint_is_refused(
    damage: Callable[[Path], object], words: str, folder: Path
) -> None:
    assert require_complete(folder).modules
    damage(folder)
    with pytest.raises(CheckpointError, match=words):
        require_complete(folder)


def test_the_name_is_checked_before_the_folder_gets_a_figure(
    folder: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(card_figure, "add_figure", lambda _: pytest.fail("the folder is changed"))
    assert main("push", folder, "no name/at all").code == 2


def test_a_dense_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="is not compressed"):
        require_complete(save_tiny_model(tmp_path / "dense"))
