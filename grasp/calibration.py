"""Text → token batches; a sample is one sequence of ``seq_len`` tokens."""

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

from grasp.builtin import packaged_file
from grasp.errors import CalibrationError, MissingPackageError
from grasp.model.batch import CalibrationBatch

Split = Literal["calibration", "evaluation"]


class HubText(NamedTuple):
    """A text data set of the hub: where it is, and the part that each of our splits reads.

    With ``files``, only the file named there is read, and only as far as needed.
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
BUILTIN = "builtin"
BUILTIN_REQUIREMENT = "exllamav3==1.6.5"
BUILTIN_FILE = "conversion/standard_cal_data/wiki.utf8"
# Runs of this many documents go to one split: related articles follow each other in the built-in text.
_BUILTIN_RUN = 25


def read_text(source: str, *, split: Split = "calibration", characters: int = 8_000_000) -> str:
    """The text of a source. The two splits of a named one have no document in common.

    Args:
        source: the path of a UTF-8 file; ``"wikitext2"`` (train or test) or ``"c4"`` (a shard of train or validation),
            fetched from the hub with the package ``datasets``; or ``"builtin"``, Wikipedia articles.
        split: what the text is for. A file is read whole for either.
        characters: how much of ``"c4"`` is enough; no more than this, rounded up to a document, is fetched.

    Raises:
        CalibrationError: if there is no such file, it is not UTF-8 or empty, or the hub cannot be reached.
        MissingPackageError: if the source needs a package that is not installed.
    """
    if source == BUILTIN:
        return builtin_text(split)
    if source in HUB_TEXTS:
        return _hub_text(source, split, characters)
    return _file_text(source)


def builtin_text(split: Split) -> str:
    """Wikipedia articles: three quarters (calibration) or the last quarter (evaluation) of each 100.

    The text is data of the package ``exllamav3`` (MIT), which is located and never imported.

    Raises:
        MissingPackageError: if that package is not installed.
    """
    text = packaged_file("exllamav3", BUILTIN_FILE, BUILTIN_REQUIREMENT).read_text(encoding="utf-8")
    articles = [article.strip() for article in re.split(r"^</?doc\b.*>$", text, flags=re.MULTILINE)]
    articles = [article for article in articles if article]
    wanted = split == "evaluation"
    return "\n\n".join(a for i, a in enumerate(articles) if (i // _BUILTIN_RUN % 4 == 3) == wanted)


def _file_text(source: str) -> str:
    path = Path(source).expanduser()
    names = ", ".join([*HUB_TEXTS, BUILTIN])
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
            f"{BUILTIN!r} or a text file need neither it nor the network."
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
            f"the text {name} cannot be fetched from the hub ({type(error).__name__}: {error}). "
            f"Check the network, or give a text file or {BUILTIN!r}, which needs none."
        ) from error
    return "\n\n".join(documents)


def _hub_rows(text: HubText, split: Split) -> Iterable[dict[str, Any]]:
    part = text.parts[split]
    files = {part: text.files[split]} if text.files else None
    load_dataset = import_module("datasets").load_dataset
    return load_dataset(text.path, text.config, data_files=files, split=part, streaming=text.files is not None)


def bos_for(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer puts at the start of a text unasked; ``None`` where it puts none."""
    bos = tokenizer.bos_token_id
    return bos if isinstance(bos, int) and tokenizer("a").input_ids[:1] == [bos] else None


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    """All of a text as one int64 (T,) tensor, without any special token."""
    # ``verbose=False``: no warning that the whole is longer than what the model takes at once.
    ids = tokenizer(text, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
    return torch.tensor(ids, dtype=torch.int64)


def require_sizes(*, num_samples: int, seq_len: int, batch_size: int) -> None:
    """Refuse what makes no batch with a token to predict.

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
    """Draw ``num_samples`` sequences of ``seq_len`` contiguous tokens from a text, none overlapping another.

    Every placement is equally likely, and so is every order. Where the tokenizer starts a text with a BOS, so does each
    sequence, within ``seq_len``.

    Returns:
        Batches of ``batch_size`` sequences, the last one possibly smaller; without mask, for there is no padding.

    Raises:
        CalibrationError: if the text has too few tokens.
        ValueError: if a number is too small.
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
            f"Take {fewer}a shorter seq_len, or more text."
        )
    rng = random.Random(seed)
    gaps = sorted(rng.sample(range(spare + num_samples), num_samples))
    starts = [gap + i * (length - 1) for i, gap in enumerate(gaps)]
    rng.shuffle(starts)
    rows = torch.stack([tokens[start : start + length] for start in starts])
    if bos is not None:
        rows = torch.cat([torch.full((num_samples, 1), bos), rows], dim=1)
    return [CalibrationBatch(batch) for batch in rows.split(batch_size)]
