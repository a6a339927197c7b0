"""Each file of a checkpoint that a command opens must lie in its folder: what a link leads to may be private."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import GenerationConfig

from grasp.checkpoint.saving import save_checkpoint
from grasp.model.lowrank_linear import LowRankLinear
from grasp.model.targets import layer_targets
from tests import forked
from tests.command_line import RunMain, assert_refused, environment
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

COMMANDS = ("convert {} -o out --to linear-pairs", "quantize {} -o out --bits 8", "recover {} -o out", "evaluate {}")
COMMANDS = (*COMMANDS, "inspect {}", "compress {} -o out", "convert {} -o out --to gguf", "push {} owner/name")
# Native readers open weights, of which Python is not told, and transformers looks for adapters only with PEFT.
OPENED_UNSEEN = {"model.safetensors", "adapter_config.json", "adapter_model.safetensors"}
LISTING = """
import os, sys
def listen(event, arguments):
    if event == "open" and isinstance(arguments[0], str) and os.path.abspath(arguments[0]).startswith(folder):
        opened.add(os.path.relpath(arguments[0], folder))
folder, opened = os.path.abspath("model"), set()
sys.addaudithook(listen)
try:
    from grasp.__main__ import main; main()
finally:
    print("OPENED", *sorted(opened - {"."}), file=sys.stderr)
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with a compressed checkpoint that has all that a checkpoint can have."""
    monkeypatch.chdir(tmp_path)
    model, folder = tiny_model("llama", vocab_size=len(byte_tokenizer())), tmp_path / "model"
    for target in layer_targets(model, 0)[0]:
        model.set_submodule(target.name, LowRankLinear.from_dense(target.module, torch.arange(4)))
    save_checkpoint(model, folder, tokenizer=byte_tokenizer(), card="# a", extra_files={"LICENSE": "b"})
    GenerationConfig().save_pretrained(folder)
    (folder / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool.jinja"):
        (folder / name).write_text("{{ messages }}")
    for name in ("special_tokens_map.json", "added_tokens.json"):
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_file_that_is_opened_must_be_in_the_folder(folder: Path, command: str, main: RunMain) -> None:
    words = command.format("model").split()
    run = forked.python(LISTING, words, cwd=folder.parent, environment=environment())
    [line] = [line for line in run.stderr.splitlines() if line.startswith("OPENED")]
    _, *opened = line.split()
    assert "config.json" in opened
    if words[0] in ("quantize", "convert", "recover"):
        assert {"chat_template.jinja", "additional_chat_templates/tool.jinja", "tokenizer_config.json"} <= {*opened}
    shutil.rmtree(folder.parent / "out", ignore_errors=True)
    (folder.parent / "private").write_text("a secret")
    for name in sorted({*opened, *OPENED_UNSEEN}):
        path, kept = folder / name, folder.parent / "kept"
        if path.exists():
            path.rename(kept)
        path.symlink_to(folder.parent / "private")
        outcome = main(*words)
        assert_refused(outcome, name)
        assert "a link" in outcome.err
        assert "a secret" not in outcome.err
        assert not (folder.parent / "out").exists()
        path.unlink()
        if kept.exists():
            kept.rename(path)
