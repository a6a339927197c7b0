"""Reads texts, tokenizes them and cuts them into batches of calibration samples."""

from __future__ import annotations

import os
import random
import re
from codecs import getincrementaldecoder
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from io import TextIOWrapper
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from grasp.builtin import BUILTIN, builtin_text_path
from grasp.errors import CalibrationError, MissingPackageError
from grasp.files import expanded
from grasp.formatting import one_line, size
from grasp.hub import HUB_ERRORS, reason
from grasp.model.batch import CalibrationBatch
from grasp.progress import Notify, no_notify
from grasp.reading import open_regular, read_text_file

Split = Literal["calibration", "evaluation"]
_FETCH_ERRORS: tuple[type[Exception], ...] = (*HUB_ERRORS, OSError, ValueError)


class HubText(NamedTuple):
    """A text data set on the hub."""

    path: str  # repository of the data set
    config: str | None  # its configuration
    parts: dict[Split, str]  # the data set's own split for each of our splits
    # the only file to read for each of our splits, as far as needed; ``None`` reads the whole part
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
# Kinds of built-in text beside Wikipedia, and their files.
_KINDS = {
    "web pages": "c4",
    "source code": "code",
    "technical texts": "technical",
    "stories": "tiny",
    "languages": "multilingual",
}
_KIND = 400_000  # characters of each for calibration, at most, and four fifths of a file
# Groups of this many articles go to one split, because neighbours in the built-in text are related.
_ARTICLE_GROUP = 25
CHARACTERS = 8_000_000  # of a streamed text, at least; a file of up to this many bytes is read whole,
_LEAST = 1_000_000  # and this many bytes, at least, of a larger one
_CHARACTERS_PER_TOKEN = 6  # an upper bound of the mean
_TOKENS_PER_FIRST = 16  # calibration tokens for one of sequences of two
_PADDED = 64  # tokens that gated delta rules and the like pad a sequence to
_PIECE = 25_000  # characters, or bytes where pieces are spaced


def read_text(source: str, *, split: Split = "calibration", characters: int = CHARACTERS) -> str:
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
    return "".join(read_pieces(source))


def read_pieces(
    source: str, *, split: Split = "calibration", tokens: int | None = None, notify: Notify = no_notify
) -> Iterable[str]:
    """Read a text as ``read_text`` does, but a file of more than 8 MB in pieces, and only as far as needed.

    The pieces are read when they are iterated over. They begin and end at line breaks, if they have any.

    Args:
        source: as for ``read_text``; ``split`` too.
        tokens: the tokens that will be drawn from the text; ``None`` for all of it. For fewer tokens than a file of
            more than 8 MB has, 6 characters per token are read, at least 1 MB, in evenly spaced pieces of 25 kB.
        notify: called with one line if only a part of a file is read.

    Raises:
        GraspError: as ``read_text`` does; during iteration for a later piece that cannot be read or is not UTF-8.

    Example:
        >>> [piece[:4] for piece in read_pieces("builtin")]
        ['2007']
    """
    wanted = None if tokens is None else _CHARACTERS_PER_TOKEN * tokens
    if source in NAMED_TEXTS:
        return [read_text(source, split=split, characters=max(CHARACTERS, wanted or 0))]
    path = expanded(source)
    expected = f"a text in UTF-8, or one of {', '.join(NAMED_TEXTS)}"
    with open_regular(path, expected, CalibrationError) as file:
        length = os.fstat(file.fileno()).st_size
    if length <= CHARACTERS:
        text = read_text_file(path, expected, CalibrationError)
        if not text.strip():
            raise CalibrationError(f"{source} has no text; expected {expected}")
        return [text]
    if wanted is not None:
        wanted = max(_LEAST, int(wanted * _bytes_per_character(path, expected, length)))
    if wanted is None or wanted >= length:
        pieces = _all_pieces(path, expected)
    else:
        notify(f"{path.name} has {size(length)}; {size(wanted)} of it are read, in evenly spaced pieces")
        pieces = _spaced_pieces(path, expected, length, wanted)
    return chain([next(pieces)], pieces)  # a large file that is no text is refused now


def builtin_text(split: Split) -> str:
    """Return texts of several kinds (calibration), or Wikipedia articles that are not among them (evaluation).

    Calibration joins the kinds of ``builtin_kinds``, because a model that is calibrated on one loses more on others.

    Raises:
        MissingPackageError: as ``builtin_kinds``.

    Example:
        >>> builtin_text("calibration")[:44]
        '2007 European Parliament election in Romania'
    """
    return _wikipedia(split) if split == "evaluation" else "\n\n".join(builtin_kinds(split).values())


def builtin_kinds(split: Split) -> dict[str, str]:
    """The built-in texts by their kind. The two splits share no passage.

    The texts are data files of the package ``exllamav3`` (MIT). The package is not imported.

    Raises:
        MissingPackageError: if the package is not installed.

    Example:
        >>> list(builtin_kinds("evaluation"))
        ['Wikipedia', 'web pages', 'source code', 'technical texts', 'stories', 'languages']
    """
    texts = {kind: builtin_text_path(file).read_text(encoding="utf-8") for kind, file in _KINDS.items()}
    if split == "evaluation":
        return {"Wikipedia": _wikipedia(split), **{kind: text[-(len(text) // 5) :] for kind, text in texts.items()}}
    shares = {kind: text[: min(_KIND, len(text) - len(text) // 5)] for kind, text in texts.items()}
    return {"Wikipedia": _wikipedia(split)[:_KIND], **shares}


def _wikipedia(split: Split) -> str:
    """The first 75 articles (calibration) or the last 25 (evaluation) of each 100."""
    text = builtin_text_path("wiki").read_text(encoding="utf-8")
    articles = [article.strip() for article in re.split(r"^</?doc\b.*>$", text, flags=re.MULTILINE)]
    articles = [article for article in articles if article]
    evaluation = split == "evaluation"
    return "\n\n".join(a for i, a in enumerate(articles) if (i // _ARTICLE_GROUP % 4 == 3) == evaluation)


@contextmanager
def _opened(path: Path, expected: str) -> Iterator[BinaryIO]:
    """Open a text; the errors of reading and decoding it become ``CalibrationError``."""
    try:
        with open_regular(path, expected, CalibrationError) as file:
            yield file
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"{path} cannot be read as text ({one_line(error)}); expected {expected}") from error


def _bytes_per_character(path: Path, expected: str, length: int) -> float:
    """In the middle of a text."""
    with _opened(path, expected) as file:
        file.seek(length // 2)
        block = file.read(_PIECE)
    return len(block) / max(1, len(block.decode(errors="ignore")))


def _all_pieces(path: Path, expected: str) -> Iterator[str]:
    rest = ""
    with _opened(path, expected) as file, TextIOWrapper(file, encoding="utf-8-sig") as stream:
        while block := stream.read(_PIECE):
            text = rest + block
            end = text.rfind("\n") + 1 or len(text)
            yield text[:end]
            rest = text[end:]
        if rest:
            yield rest


def _spaced_pieces(path: Path, expected: str, length: int, wanted: int) -> Iterator[str]:
    count = wanted // _PIECE
    with _opened(path, expected) as file:
        for i in range(count):
            file.seek(i * (length - _PIECE) // (count - 1))
            block = file.read(_PIECE)
            inside = next(n for n in range(5) if not i or n == 4 or not 0x80 <= block[n] < 0xC0)  # of a cut character
            text = getincrementaldecoder("utf-8-sig")().decode(block[inside:])  # leaves out a cut character at the end
            lines = text[text.find("\n") + 1 if i else 0 : text.rfind("\n") + 1]
            yield (lines or text).replace("\r\n", "\n")


def _hub_text(name: str, split: Split, characters: int) -> str:
    if find_spec("datasets") is None:
        raise MissingPackageError(
            f"the text {name} needs the package datasets; install it with: pip install datasets. "
            f"{BUILTIN!r} and text files need neither the package nor the network."
        )
    documents: list[str] = []
    length = 0
    try:
        for row in _hub_rows(HUB_TEXTS[name], split):
            documents.append(row["text"])
            length += len(row["text"])
            if HUB_TEXTS[name].files and length >= characters:
                break
    except _FETCH_ERRORS as error:
        raise CalibrationError(
            f"the text {name} cannot be fetched from the hub ({reason(error)}). "
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


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str | Iterable[str], *, limit: int | None = None) -> Tensor:
    """Return the tokens of a text, int64 (T,), without special tokens.

    Args:
        tokenizer: the tokenizer.
        text: a text, or the pieces of one, which are tokenized one by one.
        limit: return only this many tokens, and leave further pieces unread; ``None`` for all.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
        >>> tokenize(letters, "abba")
        tensor([0, 1, 1, 0])
        >>> tokenize(letters, ["ab", "ba"], limit=3)
        tensor([0, 1, 1])
    """
    tokens = [torch.tensor([], dtype=torch.int64)]
    count = 0
    for piece in [text] if isinstance(text, str) else text:
        # ``verbose=False`` suppresses the warning that the text is longer than the model's positions.
        ids = tokenizer(piece, add_special_tokens=False, return_attention_mask=False, verbose=False).input_ids
        tokens.append(torch.tensor(ids, dtype=torch.int64))
        count += len(ids)
        if limit is not None and count >= limit:
            break
    return torch.cat(tokens)[:limit]


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
    text: str | Iterable[str],
    *,
    num_samples: int = 128,
    seq_len: int = 512,
    batch_size: int = 1,
    seed: int = 0,
) -> list[CalibrationBatch]:
    """Draw ``num_samples`` sequences of ``seq_len`` contiguous tokens from a text or its pieces, without overlap.

    One comes from each of ``num_samples`` equal stretches of the text, so each part of a mixed text has its share;
    their order is random. If the tokenizer puts a BOS before a text, each sequence starts with it; it counts towards
    ``seq_len``.

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
    sizes = {"num_samples": num_samples, "seq_len": seq_len, "batch_size": batch_size}
    return batches_and_others(tokenizer, text, **sizes, seed=seed, others=0)[0]


def batches_and_others(
    tokenizer: PreTrainedTokenizerBase,
    text: str | Iterable[str],
    *,
    num_samples: int,
    seq_len: int,
    batch_size: int,
    seed: int,
    others: int,
) -> tuple[list[CalibrationBatch], list[CalibrationBatch]]:
    """Draw the batches of ``token_batches``, and batches of ``others`` more sequences, or as many as the text has.

    The first result does not depend on ``others``.

    Raises:
        CalibrationError, ValueError: as ``token_batches``.
    """
    require_sizes(num_samples=num_samples, seq_len=seq_len, batch_size=batch_size)
    bos = bos_for(tokenizer)
    length = seq_len - (bos is not None)
    tokens = tokenize(tokenizer, text)
    if len(tokens) < num_samples * length:
        fewer = f"at most {most} samples, " if (most := len(tokens) // length) else ""
        raise CalibrationError(
            f"the text has {len(tokens)} tokens; {num_samples} samples of {seq_len} need {num_samples * length}. "
            f"Use {fewer}a shorter seq_len, or more text."
        )
    rng = random.Random(seed)
    starts = [rng.randint(part.start, part.stop - length) for part in _equal_parts(len(tokens), num_samples)]
    ends = [0, *(start + length for start in starts)]
    free = [
        start
        for begin, end in zip(ends, [*starts, len(tokens)], strict=True)
        for start in range(begin, end - length + 1, length)
    ]
    rng.shuffle(starts)
    chosen = [free[rng.randrange(part.start, part.stop)] for part in _equal_parts(len(free), min(others, len(free)))]
    return _cut(tokens, starts, length, bos, batch_size), _cut(tokens, chosen, length, bos, batch_size)


def first_token_batches(
    tokenizer: PreTrainedTokenizerBase, batches: Sequence[CalibrationBatch], *, vocabulary: int, seed: int = 0
) -> list[CalibrationBatch]:
    """Draw sequences of two tokens, a sixteenth as many in all, for a tokenizer that puts no BOS before a text.

    All tokens of a sequence attend to its first one, whatever it is, and long sequences show few of them. A fourth of
    these begin with a special token, as chats do; half of those with one that has a role, such as EOS. The others are
    parts of ``batches``.

    Args:
        tokenizer: the tokenizer.
        batches: from ``token_batches``; what is returned belongs behind them.
        vocabulary: special tokens from this number on are left out.
        seed: selects the sequences.

    Returns:
        Batches of fewer tokens than the given ones, because some models pad short sequences; none if the tokenizer puts
        a BOS before a text.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import PreTrainedTokenizerFast
        >>> letters = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE({"a": 0, "b": 1}, [])))
        >>> batches = token_batches(letters, 40 * "abba", num_samples=2, seq_len=64)
        >>> [tuple(batch.input_ids.shape) for batch in first_token_batches(letters, batches, vocabulary=2)]
        [(4, 2)]
    """
    if bos_for(tokenizer) is not None:
        return []
    pairs = torch.cat([batch.input_ids.unfold(1, 2, 1).flatten(0, 1) for batch in batches])
    count = sum(batch.num_tokens for batch in batches) // (2 * _TOKENS_PER_FIRST)
    rng = random.Random(seed)
    rows = pairs[rng.sample(range(len(pairs)), count)]
    added = [token for token, content in tokenizer.added_tokens_decoder.items() if content.special]
    roles = [token for token in tokenizer.all_special_ids if token in added and token < vocabulary]
    special = [token for token in added if token < vocabulary]
    firsts = [rng.choice(each) for each in (roles, special) if each for _ in range(count // 8)]
    rows[: len(firsts), 0] = torch.tensor(firsts, dtype=torch.int64)
    largest = max(batch.input_ids.numel() for batch in batches)
    most = min(largest // 2, max(_PADDED, largest // _PADDED))
    return [CalibrationBatch(batch) for batch in rows.split(most)] if count else []


def _equal_parts(length: int, count: int) -> list[range]:
    """Divide ``range(length)`` into parts that differ in length by one at most."""
    borders = [length * i // count for i in range(count)] + [length]
    return [range(start, stop) for start, stop in pairwise(borders)]


def _cut(
    tokens: Tensor, starts: Sequence[int], length: int, bos: int | None, batch_size: int
) -> list[CalibrationBatch]:
    if not starts:
        return []
    rows = torch.stack([tokens[start : start + length] for start in starts])
    if bos is not None:
        rows = torch.cat([torch.full((len(starts), 1), bos), rows], dim=1)
    return [CalibrationBatch(batch) for batch in rows.split(batch_size)]
