from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from grasp.errors import UnsupportedModelError
from grasp.export.gguf_file import write_gguf
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import trained_tokenizer

TEXT = "I'll count 12345 apples,\n\n  don't   WE'RE  naïve — 東京 3.14!\r\n x\t\ty<tool> again  <|end|>\n"
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def by_words(digits: str) -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(WORDS % digits), behavior="isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


SPLITS = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "llama-bpe": by_words("{1,3}"),
    "qwen2": by_words(""),
}


@pytest.mark.parametrize("name", SPLITS)
def test_llama_cpp_splits_text_like_the_tokenizer(name: str, tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    tokenizer = trained_tokenizer(TEXT, SPLITS[name], skips=name == "llama-bpe", adds_bos=name == "llama-bpe")
    model = tiny_model("llama", vocab_size=len(tokenizer) + 3)
    write_gguf(model, tmp_path / "model.gguf", "F16", tokenizer)
    loaded = llama_cpp.Llama(str(tmp_path / "model.gguf"), vocab_only=True, verbose=False)
    assert loaded.metadata["tokenizer.ggml.pre"] == name
    assert loaded.metadata["tokenizer.chat_template"] == "{{ messages }}"
    assert loaded.tokenize(TEXT.encode(), special=True) == tokenizer(TEXT).input_ids
    assert len(set(tokenizer(TEXT).input_ids)) > 20


def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(tmp_path: Path) -> None:
    known = trained_tokenizer(TEXT, SPLITS["gpt-2"])
    model = tiny_model("llama", vocab_size=len(known))
    others = (
        trained_tokenizer(TEXT, pre_tokenizers.ByteLevel(add_prefix_space=True)),
        trained_tokenizer(TEXT, SPLITS["gpt-2"], skips=True),
        trained_tokenizer(TEXT, by_words("{1,4}")),
        PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
    )
    for tokenizer in others:
        with pytest.raises(UnsupportedModelError, match=r"splits text as gpt-2, llama-bpe, .*convert_hf_to_gguf\.py"):
            write_gguf(model, tmp_path / "model.gguf", "F16", tokenizer)
    with pytest.raises(UnsupportedModelError, match="with at most 97 tokens"):
        write_gguf(tiny_model("llama"), tmp_path / "model.gguf", "F16", known)
