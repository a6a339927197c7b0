from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grasp import model_card as module
from grasp.checkpoint import save_checkpoint
from grasp.model_card import is_hub_name, model_card, read_license
from grasp.modules import LowRankLinear
from tests.tiny_models import tiny_model


def installed() -> bool:
    try:
        distribution("grasp-llm")
    except PackageNotFoundError:
        return False
    return True


@pytest.fixture
def model() -> PreTrainedModel:
    """Two linears of layer 1 low-rank: 48 x 32 and, with a bias, 32 x 32."""
    model = tiny_model("qwen2")
    for name, rank in (("model.layers.1.mlp.up_proj", 4), ("model.layers.1.self_attn.q_proj", 8)):
        model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(rank)))
    return model


def test_front_matter_is_what_the_hub_reads(model: PreTrainedModel) -> None:
    card = ModelCard(model_card(model, base_model="owner/Name-1.5B", license={"license": "apache-2.0"}))
    assert card.data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["grasp", "low-rank"],
        "base_model": "owner/Name-1.5B",
        "base_model_relation": "quantized",
        "license": "apache-2.0",
    }
    assert card.text.strip().startswith("# Name-1.5B, compressed\n\n[owner/Name-1.5B](https://huggingface.co/owner/")


@pytest.mark.parametrize(
    ("base_model", "title"),
    [
        (None, "A qwen2 model"),
        ("builtin", "Builtin"),
        (".", "A qwen2 model"),
        ("/home/someone/models/my-model", "My-model"),
        ("models/tiny.Q4_1.gguf", "Tiny.Q4_1"),
    ],
)
def test_a_base_model_that_is_not_on_the_hub_is_no_link(
    model: PreTrainedModel, base_model: str | None, title: str
) -> None:
    text = model_card(model, base_model=base_model)
    data = ModelCard(text).data.to_dict()
    assert "base_model" not in data
    assert "base_model_relation" not in data
    assert f"# {title}, compressed\n\n{title}, made smaller" in text
    assert "someone" not in text


def test_a_path_that_exists_is_no_hub_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_name("owner/model")
    (tmp_path / "owner/model").mkdir(parents=True)
    assert not is_hub_name("owner/model")


def test_table_says_what_was_compressed_and_what_that_took_out(model: PreTrainedModel) -> None:
    text = model_card(model, base_model=None, details="## Quality\n\nPerplexity 10 → 12.")
    before = sum(p.numel() for p in tiny_model("qwen2").parameters())
    after = sum(p.numel() for p in model.parameters())
    assert f"takes {1 - after / before:.1%} of the parameters out of the model ({before:,} before" in text
    assert f", {after:,} now)" in text
    kept = (4 * (48 + 32) + 8 * (32 + 32) + 32) / (48 * 32 + 32 * 32 + 32)
    assert f"| `model.layers.1` | `self_attn.q_proj` 8 of 32, `mlp.up_proj` 4 of 32 | {kept:.1%} |\n" in text
    assert text.endswith("## Quality\n\nPerplexity 10 → 12.\n")


def test_licence_is_read_from_a_folder(tmp_path: Path) -> None:
    assert read_license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# A\n")
    assert read_license(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    (tmp_path / "README.md").write_text("no front matter")
    assert read_license(str(tmp_path)) == {}


def test_licence_is_read_from_the_hub_where_it_can_be_reached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    asked: list[tuple[str, str]] = []

    def download(repository: str, file: str) -> str:
        asked.append((repository, file))
        if repository == "owner/model":
            return str(tmp_path / file)
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(module, "hf_hub_download", download)
    assert read_license("owner/model") == {"license": "mit"}
    assert read_license("owner/other") == {}
    assert asked == [("owner/model", "README.md"), ("owner/other", "README.md")]


@pytest.mark.slow
@pytest.mark.skipif(not installed(), reason="grasp-llm is not installed in this environment")
def test_the_usage_snippet_runs_in_the_folder(tmp_path: Path) -> None:
    model = tiny_model("llama")
    name = "model.layers.1.mlp.up_proj"
    model.set_submodule(name, LowRankLinear.from_dense(model.get_submodule(name), torch.arange(4)))
    vocabulary = {word: number for number, word in enumerate(["?", "The", "first", "thing"])}
    words = Tokenizer(WordLevel(vocabulary | {f"w{number}": number for number in range(4, 97)}, unk_token="?"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    folder = save_checkpoint(
        model, tmp_path / "out", tokenizer=tokenizer, card=model_card(model, base_model="owner/model")
    )
    snippet = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    assert snippet is not None
    result = subprocess.run([sys.executable, "-c", snippet[1]], cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("The first thing")
