"""Pieces of an HTML page; whatever is given as text is escaped. Pure functions."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple


class Column(NamedTuple):
    """A column of a table: what it shows of a row, and how it writes a number; words are written as they are."""

    heading: str
    value: Callable[[Any], Any]
    number: Callable[[Any], str] | None = None


def escape(text: object) -> str:
    """Text as HTML, fit for attributes too."""
    return html.escape(str(text))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def table(caption: str, columns: Sequence[Column], rows: Sequence[Any]) -> str:
    """A table that sorts by the heading that is chosen; what is ``None`` is left blank."""
    heads = "".join(
        f'<th scope="col"{_number_class(column)}><button type="button">{escape(column.heading)}</button></th>'
        for column in columns
    )
    body = "".join("<tr>" + "".join(_cell(column, column.value(row)) for column in columns) + "</tr>" for row in rows)
    return (
        f'<h3>{escape(caption)}</h3><div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(svg: str, title: str, caption: str) -> str:
    """An ``<svg>`` that is trusted, with its title and caption."""
    return f"<figure>{svg}<figcaption><strong>{escape(title)}</strong><br>{escape(caption)}</figcaption></figure>"


def section(name: str, heading: str, *parts: str) -> str:
    """A part of the page, with a name that links can point to."""
    return f'<section id="{escape(name)}"><h2>{escape(heading)}</h2>{"".join(parts)}</section>'


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{escape(text)}</p>"


def command(text: str) -> str:
    """What is typed into a terminal."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def details(summary: str, content: str, *, is_open: bool = False) -> str:
    """What is shown when it is asked for."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def not_measured(what: str, how: str) -> str:
    """That there are no data, and what makes them."""
    return f'<p class="missing"><strong>Not measured:</strong> {escape(what)}. To have it here:</p>{command(how)}'


def page(title: str, content: str, *, generator: str, style: str, script: str) -> str:
    """A whole document that loads nothing: its policy allows only what stands in it.

    ``style`` and ``script`` are our own and stand as they are.
    """
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'"
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta name="generator" content="{escape(generator)}">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{style}</style></head>"
        f"<body><main>{content}</main><script>{script}</script></body></html>\n"
    )


def _number_class(column: Column) -> str:
    return ' class="number"' if column.number else ""


def _cell(column: Column, value: Any) -> str:
    if value is None:
        return "<td></td>"
    if column.number is None:
        return f"<td>{escape(value)}</td>"
    return f'<td class="number" data-value="{escape(value)}">{escape(column.number(value))}</td>'
