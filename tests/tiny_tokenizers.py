"""Tiny tokenizers that need no file."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS = 1


def byte_tokenizer(*, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """One token per byte, from 3 on. It has a BOS, which it puts before a text only if ``adds_bos``."""
    special = ["<pad>", "<s>", "</s>"]
    vocabulary = special + sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(vocabulary)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", model_max_length=64
    )


def trained_tokenizer(
    text: str, split: pre_tokenizers.PreTokenizer | None = None, *, skips: bool = False, adds_bos: bool = False
) -> PreTrainedTokenizerFast:
    """A BPE tokenizer that knows the parts of a text, one special and one ordinary added token, at most 421 in all.

    Args:
        text: of training.
        split: of text into parts; ``None`` for GPT-2's.
        skips: whether known parts skip the merges.
        adds_bos: whether it puts its BOS before a text.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=skips))
    tokenizer.pre_tokenizer = split or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        [text] * 3, trainers.BpeTrainer(vocab_size=420, special_tokens=["<|end|>"], initial_alphabet=alphabet)
    )
    tokenizer.add_tokens(["<tool>"])
    if adds_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>", chat_template="{{ messages }}"
    )
