"""Numbers, sizes, ranges, table cells and exceptions as text."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from pathlib import PurePath
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a table, for the terminal and for a page."""

    heading: str
    value: str | Callable[[Any], Any]  # a path of attributes, or a function of the row
    text: Callable[[Any], str] = str  # of a value that is not None

    def value_of(self, row: Any) -> Any:
        """The value of this column in a row; ``None`` for a blank cell."""
        return attrgetter(self.value)(row) if isinstance(self.value, str) else self.value(row)

    def text_of(self, row: Any) -> str:
        """The text of this column in a row; empty for a blank cell."""
        value = self.value_of(row)
        return "" if value is None else self.text(value)


def one_line(message: BaseException | str, limit: int | None = 300) -> str:
    """The message of an exception on one line, cut to ``limit`` characters.

    The class comes first where the message is only a key, and alone where there is no message.
    """
    text = " ".join(str(message).split())
    if isinstance(message, LookupError) or not text:
        text = f"{type(message).__name__}: {text}".removesuffix(": ")
    return text if limit is None or len(text) <= limit else f"{text[: limit - 1]}…"


def printable(text: str, keep: str = "") -> str:
    """Text for a terminal: characters that would control it or show as nothing are written as escapes.

    Args:
        text: of any origin: a name in a checkpoint, an argument, the message of a library.
        keep: control characters that stay, such as a line end.

    Example:
        >>> printable("a\\x1b[31m b")
        'a\\\\x1b[31m b'
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def json_text(document: Any) -> str:
    """A JSON document; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(document), indent=2, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and value - value != 0:
        return None
    return value


def count(value: float) -> str:
    """A number of parameters or tokens: ``"134.5 M"``."""
    return _scaled(value, ("", " K", " M", " B", " T"))


def size(value: float) -> str:
    """A number of bytes, decimal units: ``"538.1 MB"``."""
    return _scaled(value, (" B", " KB", " MB", " GB", " TB"))


def share(value: float) -> str:
    """A fraction in per cent: ``"15.8 %"``."""
    return f"{100 * value:.1f} %"


def model_name(name: str) -> str:
    """The name of a model, without folders if it is an absolute path."""
    return PurePath(name).name if PurePath(name).is_absolute() else name


def counts(kinds: Iterable[str]) -> str:
    """How many there are of each kind, most first: ``"68 pivoted, 2 factored"``."""
    return ", ".join(f"{number} {kind}" for kind, number in Counter(kinds).most_common())


def layer_ranges(layers: Sequence[int]) -> str:
    """Ascending numbers, three or more in a row as a range: ``"3, 12-15, 17"``."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 2 else ", ".join(str(layer) for layer in run) for run in runs)


def _scaled(value: float, units: Sequence[str]) -> str:
    unit = units[0]
    for larger in units[1:]:
        if abs(value) < 999.95:
            break
        value, unit = value / 1000, larger
    return f"{value:.0f}{unit}" if unit == units[0] else f"{value:.1f}{unit}"


def duration(seconds: float) -> str:
    """A number of seconds in the unit that suits it: ``"90.0 s"``, ``"12.5 min"``, ``"3.2 h"``."""
    for limit, unit, factor in ((120, "s", 1), (7200, "min", 60)):
        if seconds < limit:
            return f"{seconds / factor:.1f} {unit}"
    return f"{seconds / 3600:.1f} h"


def score_rows(results: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Rows of a table: task, documents, shots, metric, value, standard error; none if no tasks were run."""
    rows: list[tuple[str, ...]] = []
    for task, values in results.get("results", {}).items():
        documents = results["n-samples"].get(task, {}).get("effective", "")
        for key, value in values.items():
            metric, _, variant = key.partition(",")
            if not isinstance(value, float) or metric.endswith("_stderr"):
                continue
            error = values.get(f"{metric}_stderr,{variant}")
            error_text = f"{error:.4f}" if isinstance(error, float) else "-"
            rows.append(
                (task, str(documents), str(results["n-shot"].get(task, "")), metric, f"{value:.4f}", error_text)
            )
    return rows
