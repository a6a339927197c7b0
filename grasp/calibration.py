"""Reads texts, tokenizes them and cuts them into batches of calibration samples."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp.builtin import BUILTIN, builtin_text_path
from grasp.errors import CalibrationError, MissingPackageError
from grasp.formatting import one_line
from grasp.model.batch import CalibrationBatch

Split = Literal["calibration", "evaluation"]


class HubText(NamedTuple):
    """A text data set on the hub.

    Attributes:
        path: repository of the data set.
        config: its configuration.
        parts: the data set's own split for each of our splits.
        files: the only file to read for each of our splits, as far as needed; ``None`` reads the whole part.
    """

    path: str
    config: str | None
    parts: dict[Split, str]
    files: dict[Split, str] | None = None


HUB_TEXTS = {
    "wikitext2": HubText("Salesforce/wikitext", "wikitext-2-raw-v1", {"calibration": "train", "evaluation": "test"}),
    "c4": HubText(
        "allenai/c4",
        None,
        {"calibration": "train", "evaluation": "validation"},
        {
            "calibration": "en/c4-train.00000-of-01024.json.gz",
            "evaluation": "en/c4-validation.00000-of-00008.json.gz",
        },
    ),
}
NAMED_TEXTS = (*HUB_TEXTS, BUILTIN)
# Groups of this many articles go to one split, because neighbours in the built-in text are related.
_ARTICLE_GROUP = 25


def read_text(source: str, *, split: Split = "calibration", characters: int = 8_000_000) -> str:
    """Read the text of a source. The two splits of a named text share no document.

    Args:
        source: the path of a UTF-8 file; ``"wikitext2"`` (train or test) or ``"c4"`` (a shard of train or validation),
            fetched from the hub with the package ``datasets``; or ``"builtin"``, see ``builtin_text``.
        split: the use of the text. A file has no splits: it is always read whole.
        characters: length of text to fetch of ``"c4"``, rounded up to a document.

    Raises:
        CalibrationError: if there is no such file, it is empty or not UTF-8, or the hub cannot be reached.
        MissingPackageError: if the source needs a package that is not installed.

    Example:
        >>> import tempfile
        >>> with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        ...     print("a text", file=file, flush=True)
        ...     read_text(file.name)
        'a text\\n'
    """
    if source == BUILTIN:
        return builtin_text(split)
    if source in HUB_TEXTS:
        return _hub_text(source, split, characters)
    return _file_text(source)


def builtin_text(split: Split) -> str:
    """Return Wikipedia articles: the first 75 (calibration) or the last 25 (evaluation) of each 100.

    The text is a data file of the package ``exllamav3`` (MIT). The package is not imported.

    Raises:
        MissingPackageError: if the package is not installed.

    Example:
        >>> builtin_text("calibration")[:44]
        '2007 European Parliament election in Romania'
    """
    text = builtin_text_path().read_text(encoding="utf-8")
    articles = [article.strip() for article in re.split(r"^</?doc\b.*>$", text, flags=re.MULTILINE)]
    articles = [article for article in articles if article]
    evaluation = split == "evaluation"
    return "\n\n".join(a for i, a in enumerate(articles) if (i // _ARTICLE_GROUP % 4 == 3) == evaluation)


def _file_text(source: str) -> str:
    path = Path(source).expanduser()
    names = ", ".join(NAMED_TEXTS)
    if not path.is_file():
        raise CalibrationError(f"no text file {source}; expected a path or one of {names}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{source} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}); convert it to UTF-8 text"
        ) from error
    if not text.strip():
        raise CalibrationError(f"{source} has no text; expected UTF-8 text, or one of {names}")
    return text


def _hub_text(name: str, split: Split, characters: int) -> str:
    if find_spec("datasets") is None:
        raise MissingPackageError(
            f"the text {name} needs the package datasets; install it with: pip install datasets. "
            f"{BUILTIN!r} and text files need neither the package nor the network."
        )
    documents: list[str] = []
    size = 0
    try:
        for row in _hub_rows(HUB_TEXTS[name], split):
            documents.append(row["text"])
            size += len(row["text"])
            if HUB_TEXTS[name].files and size >= characters:
                break
    except (OSError, ValueError) as error:
        raise CalibrationError(
            f"the text {name} cannot be fetched from the hub ({one_line(error)}). "
            f"Check the network, or use a text file or {BUILTIN!r}, which need none."
        ) from error
    return "\n\n".join(documents)


def _hub_rows(text: HubText, split: Split) -> Iterable[dict[str, Any]]:
    part = text.parts[split]
    files = {part: text.files[split]} if text.files else None
    load_dataset = import_module("datasets").load_dataset
    return load_dataset(text.path, text.config, data_files=files, split=part, streaming=text.files is not None)


def bos_for(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the BOS token if the tokenizer puts it before a text by default, else ``None``."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos] else None


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """Return the tokens of a text, int64 (T,), without special tokens.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
        >>> tokenize(letters, "abba")
        tensor([0, 1, 1, 0])
    """
    # ``verbose=False`` suppresses the warning that the text is longer than the model's positions.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def require_sizes(*, num_samples: int, seq_len: int, batch_size: int) -> None:
    """Check that the sizes give batches with at least one token to predict.

    Raises:
        ValueError: if a number is too small.
    """
    for name, value, least in (("num_samples", num_samples, 1), ("seq_len", seq_len, 2), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def token_batches(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    *,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 1,
    seed: int = 0,
) -> list[CalibrationBatch]:
    """Draw ``num_samples`` sequences of ``seq_len`` contiguous tokens from a text, without overlap.

    All placements and orders are equally likely. If the tokenizer puts a BOS before a text, each sequence starts with
    it; it counts towards ``seq_len``.

    Returns:
        Batches of ``batch_size`` sequences without mask, since there is no padding; the last one may be smaller.

    Raises:
        CalibrationError: if the text has too few tokens.
        ValueError: if a number is too small.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
        >>> batches = token_batches(letters, "abbabaabbaba", num_samples=3, seq_len=4, batch_size=2)
        >>> [tuple(batch.input_ids.shape) for batch in batches]
        [(2, 4), (1, 4)]
    """
    require_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    bos = bos_for(tokenizer)
    length = seq_len - (bos is not None)
    tokens = tokenize(tokenizer, text)
    spare = len(tokens) - num_samples * length
    if spare < 0:
        fewer = f"at most {most} samples, " if (most := len(tokens) // length) else ""
        raise CalibrationError(
            f"the text has {len(tokens)} tokens; {num_samples} samples of {seq_len} need {num_samples * length}. "
            f"Use {fewer}a shorter seq_len, or more text."
        )
    rng = random.Random(seed)
    gaps = sorted(rng.sample(range(spare + num_samples), num_samples))
    starts = [gap + i * (length - 1) for i, gap in enumerate(gaps)]
    rng.shuffle(starts)
    rows = torch.stack([tokens[start : start + length] for start in starts])
    if bos is not None:
        rows = torch.cat([torch.full((num_samples, 1), bos), rows], dim=1)
    return [CalibrationBatch(batch) for batch in rows.split(batch_size)]
