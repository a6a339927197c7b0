from __future__ import annotations

import math
import re
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from grasp.checkpoint import card as module
from grasp.checkpoint.card import (
    folder_card,
    is_hub_name,
    model_card,
    read_card,
    read_license,
    with_results,
    with_section,
    with_sizes,
    without_results,
)
from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.checkpoint.saving import save_checkpoint
from grasp.errors import CheckpointError
from grasp.model.lowrank_linear import LowRankLinear
from tests.documents import run_python
from tests.quantized_models import quantized_model
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
    assert f"# {title}, compressed\n\n{title}, compressed with" in text
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
    assert f"{1 - after / before:.1%} of the model's parameters were removed ({before:,} before" in text
    assert f", {after:,} now)" in text
    share = (4 * (48 + 32) + 8 * (32 + 32) + 32) / (48 * 32 + 32 * 32 + 32)
    assert f"| `model.layers.1` | `self_attn.q_proj` 8 of 32, `mlp.up_proj` 4 of 32 | {share:.1%} |\n" in text
    assert text.endswith("## Quality\n\nPerplexity 10 → 12.\n")


def test_sizes_of_a_pivoted_model_replace_those_of_the_card(model: PreTrainedModel) -> None:
    texts = ("", "## Quality\n\nIt has \\1. No 7 linear layers were replaced by hand.")
    cards = [model_card(model, base_model="owner/model", details=text) for text in texts]
    assert "Form of the low-rank layers: 2 factored." in cards[0]
    assert model.get_submodule("model.layers.1.mlp.up_proj").pivot_() is None
    expected = [model_card(model, base_model="owner/model", details=text) for text in texts]
    assert "Form of the low-rank layers: 1 factored, 1 pivoted." in expected[0]
    assert [with_sizes(card, model, None) for card in cards] == expected != cards
    assert with_sizes("# Mine\n", model, None) == "# Mine\n"


def test_licence_is_read_from_a_folder(tmp_path: Path) -> None:
    assert read_license(str(tmp_path)) == {}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: mine\ntags: [a]\n---\n# A\n")
    assert read_license(str(tmp_path)) == {"license": "other", "license_name": "mine"}
    (tmp_path / "README.md").write_text("---\nlicense: mit\nmodel-index: [{name: A}]\n---\n")  # which has no results
    assert read_license(str(tmp_path)) == {"license": "mit"}
    for damaged in ("no front matter", "---\ntags: 5\n---\n"):
        (tmp_path / "README.md").write_text(damaged)
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


PERPLEXITY = {"perplexity": 24.25, "tokens": 4092, "window": 512}


def document(parameters: int, *, text: str | None = None, acc: float | None = None) -> dict[str, Any]:
    """What ``grasp evaluate --json`` prints, as far as a card reads it."""
    evaluation = {"model": "/home/someone/small", "text": text, "result": PERPLEXITY if text else None}
    evaluation["size"] = {"parameters": parameters, "bytes": 4 * parameters}
    if acc is None:
        return evaluation
    scores = {"name": "piqa", "acc,none": acc, "acc_stderr,none": 0.01, "sample_len": 500}
    return {
        "results": {"piqa": scores},
        "n-samples": {"piqa": {"effective": 500}},
        "n-shot": {"piqa": 0},
        "grasp": evaluation,
    }


def test_results_are_shown_and_are_the_hubs_model_index(model: PreTrainedModel) -> None:
    card = model_card(model, base_model="owner/Name-1.5B", license={"license": "mit"}, details="## How\n\nSo.")
    documents = [
        document(100, text="/home/someone/text.txt"),
        document(100, acc=0.625),
        document(120, text="builtin"),
        document(7, acc=0.99),
    ]
    shown = with_results(card, documents, parameters=100, before=120)
    data = ModelCard(shown).data
    assert isinstance(data, ModelCardData)
    assert data.eval_results is not None
    assert [(r.dataset_type, r.metric_type, r.metric_value) for r in data.eval_results] == [
        ("a text", "perplexity", 24.25),
        ("piqa", "acc", 0.625),
    ]
    assert data.model_name == "Name-1.5B, compressed"
    assert (data.base_model, data.license) == ("owner/Name-1.5B", "mit")
    assert "| before compression | 4,092 tokens of builtin, windows of 512 | perplexity | 24.250 |\n" in shown
    assert "| this model | 4,092 tokens of a text, windows of 512 | perplexity | 24.250 |\n" in shown
    assert "| this model | `piqa` of lm-eval, 500 documents, 0 shots | acc | 0.6250 ± 0.0100 |\n" in shown
    assert "0.99" not in shown
    assert "someone" not in shown
    assert "## How\n\nSo." in shown


def test_results_before_quantisation_are_not_the_quantised_models(model: PreTrainedModel) -> None:
    dense, quantised = (document(100, acc=acc) for acc in (0.5, 0.25))
    quantised["grasp"]["quantized"] = True
    shown = with_results(
        model_card(model, base_model=None), [dense, quantised], parameters=100, before=100, is_quantized=True
    )
    assert re.findall(r"\| (.*?) \|.*\| (0\.\d+) ±", shown) == [
        ("before compression", "0.5000"),
        ("this model", "0.2500"),
    ]


def test_earlier_results_are_those_of_a_quantised_model_if_they_have_few_bytes(model: PreTrainedModel) -> None:
    result = document(100, acc=0.25)
    result["grasp"]["size"]["bytes"] = 110
    sizes: dict[str, Any] = {"parameters": 100, "before": 100, "is_quantized": True}
    assert "| this model |" in with_results(model_card(model, base_model=None), [result], **sizes)


def test_the_tags_say_that_a_model_was_quantised(model: PreTrainedModel) -> None:
    card = model_card(model, base_model="owner/model")
    assert ModelCard(card).data.tags == ["grasp", "low-rank"]
    assert ModelCard(with_sizes(card, quantized_model(), None)).data.tags == ["grasp", "low-rank", "quantized"]


def test_results_take_the_place_of_earlier_ones_and_can_be_taken_out(model: PreTrainedModel) -> None:
    card = model_card(model, base_model=None)
    once = with_results(card, [document(100, acc=0.5)], parameters=100)
    twice = with_results(once, [document(100, acc=0.75)], parameters=100)
    assert "0.5000" not in twice
    assert twice.count("## Evaluation by grasp") == 1
    assert without_results(twice) == card
    assert without_results("no card at all") == "no card at all"


def test_a_section_takes_the_place_of_the_former_one_and_no_other_is_lost() -> None:
    card = with_section(with_section("# Card\n", "Recovery", "once"), "Quantisation", "four bits")
    assert with_section(card, "Recovery", "twice") == "# Card\n\n## Quantisation\n\nfour bits\n\n## Recovery\n\ntwice\n"


def test_a_number_that_is_not_finite_is_not_shown(model: PreTrainedModel) -> None:
    broken = document(100, text="builtin")
    broken["result"] = {**PERPLEXITY, "perplexity": None}
    card = model_card(model, base_model=None)
    assert with_results(card, [broken], parameters=100) == card
    tasks = {"results": {"piqa": {"acc,none": math.nan}}, "n-samples": {}, "n-shot": {}, "grasp": broken}
    assert with_results(card, [tasks], parameters=100) == card


def test_the_card_of_a_folder_says_what_that_of_the_model_says(model: PreTrainedModel, tmp_path: Path) -> None:
    save_checkpoint(model, tmp_path / "out")
    checkpoint = inspect_checkpoint(tmp_path / "out")
    cards = folder_card(checkpoint, base_model="a/b"), model_card(model, base_model="a/b")
    assert len({tuple(sorted(re.split(r" *[\n,|] *", card))) for card in cards}) == 1  # modules in any order


def test_parameters_of_removed_layers_count_as_removed(model: PreTrainedModel) -> None:
    before = 2 * model.num_parameters()
    card = model_card(model, base_model=None, before=before)
    removed = f"{0.5:.1%} of the model's parameters were removed ({before:,} before, {model.num_parameters():,} now)."
    assert removed in card
    assert with_sizes(model_card(model, base_model=None), model, before) == card


@pytest.mark.parametrize("card", ["# No front matter\n", "---\ntags: [a\n---\n# Broken\n", "---\njust text\n---\n"])
def test_front_matter_that_the_hub_could_not_read_is_refused(card: str) -> None:
    with pytest.raises(CheckpointError, match="front matter"):
        read_card(card)


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
    assert run_python(snippet[1], folder).startswith("The first thing")


def test_hostile_names_add_neither_links_nor_html_nor_lines_to_a_card() -> None:
    evil = "x](http://evil)<script>`|\n---\n# fake\x1b[0m"
    layer = module._CardLayer(rank=1, in_features=8, out_features=8, parameters=16, dense_parameters=64)
    for base_model in (None, evil):
        text = module._render(
            evil, {f"model.layers.0.{evil}": layer}, [], (100, None), base_model, {"license": evil}, ""
        )
        body = text.split("\n---\n", 1)[1]
        assert not re.search(r"(?<!\\)(\](?=\(http://evil)|<script)", re.sub(r"`[^`]*`", "", body))
        assert not any(line.startswith(("---", "# fake")) for line in body.splitlines())
        assert body.replace("\n", "").isprintable()
        assert ModelCard(text).data.license == evil
