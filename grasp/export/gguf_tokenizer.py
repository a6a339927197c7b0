"""A tokenizer in a GGUF file."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from grasp.errors import UnsupportedModelError

REMEDY = (
    "Save the model that model.dequantize() returns with save_pretrained, and give the folder to llama.cpp's "
    "convert_hf_to_gguf.py"
)
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5  # gguf.TokenType
_LLAMA3, _QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
    for digits in ("{1,3}", "")
)
# How a tokenizer splits text before it merges bytes, and whether it skips merges of known words → llama.cpp's name.
_SPLITS = {
    (("ByteLevel",), False): "gpt-2",
    (("Digits", "ByteLevel"), False): "smollm",
    ((_LLAMA3,), True): "llama-bpe",
    ((_QWEN2,), False): "qwen2",
}


def add_tokenizer(writer: Any, tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Write a byte-level BPE tokenizer: its tokens, merges, special tokens and chat template.

    Args:
        writer: a ``gguf.GGUFWriter``.
        tokenizer: splits text as GPT-2, SmolLM2, Llama 3 or Qwen2 do.
        vocab_size: of the model; ids without a token become unused ones.

    Raises:
        UnsupportedModelError: if llama.cpp would split text otherwise.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str()) if tokenizer.is_fast else {}
    name = _split_name(backend)
    if name is None or len(tokenizer) > vocab_size:
        raise UnsupportedModelError(
            f"no GGUF file is written: expected a byte-level BPE tokenizer that splits text as "
            f"{', '.join(sorted(_SPLITS.values()))} do, with at most {vocab_size} tokens. {REMEDY}"
        )
    added = {token["id"]: token for token in backend["added_tokens"]}
    tokens = {index: token for token, index in tokenizer.get_vocab().items()}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list([tokens.get(index, f"[PAD{index}]") for index in range(vocab_size)])
    writer.add_token_types([_type(index, tokens, added) for index in range(vocab_size)])
    writer.add_token_merges([" ".join(merge) for merge in backend["model"]["merges"]])
    encoded = tokenizer("a").input_ids
    for kind, place in (("bos", 0), ("eos", -1)):
        if (index := getattr(tokenizer, f"{kind}_token_id")) is not None:
            getattr(writer, f"add_{kind}_token_id")(index)
            getattr(writer, f"add_add_{kind}_token")(index == encoded[place])
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def _split_name(backend: dict[str, Any]) -> str | None:
    """llama.cpp's name of the way in which a tokenizer splits text; ``None`` if it has none."""
    if (model := backend.get("model") or {}).get("type") != "BPE" or model.get("byte_fallback"):
        return None
    before = backend["pre_tokenizer"] or {}
    splits = []
    for step in before.get("pretokenizers", [before]):
        if step.get("add_prefix_space") or step.get("individual_digits") is False:
            return None
        if step.get("type") == "ByteLevel" and not step["use_regex"]:
            continue
        splits.append(step["pattern"].get("Regex") if step.get("type") == "Split" else step.get("type"))
    return _SPLITS.get((tuple(splits), bool(model.get("ignore_merges"))))


def _type(index: int, tokens: dict[int, str], added: dict[int, dict[str, Any]]) -> int:
    if index not in tokens:
        return _UNUSED
    if index not in added:
        return _NORMAL
    return _CONTROL if added[index]["special"] else _USER_DEFINED
