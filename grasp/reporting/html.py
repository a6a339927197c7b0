"""Pieces of an HTML page; text is escaped. Pure functions."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any, SupportsFloat

from grasp.formatting import Column


def escape(text: object) -> str:
    """Text as HTML, also for attributes."""
    return html.escape(str(text))


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Names and values."""
    return "<dl>" + "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in pairs) + "</dl>"


def table(caption: str, columns: Sequence[Column], rows: Sequence[Any], text: str = "") -> str:
    """A table that sorts by the heading that is clicked; ``None`` is a blank cell. ``text`` is HTML above it."""
    heads = "".join(
        f'<th scope="col"{_number_class(column, rows)}><button type="button">{escape(column.heading)}</button></th>'
        for column in columns
    )
    body = "".join("<tr>" + "".join(_cell(column, row) for column in columns) + "</tr>" for row in rows)
    return (
        f"<h3>{escape(caption)}</h3>{text}"
        f'<div class="scroll" role="region" tabindex="0" aria-label="{escape(caption)}">'
        f'<table class="sortable"><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def figure(svg: str, title: str, caption: str) -> str:
    """An ``<svg>``, which is not escaped, with its title and caption."""
    return f"<figure>{svg}<figcaption><strong>{escape(title)}</strong><br>{escape(caption)}</figcaption></figure>"


def section(name: str, heading: str, *parts: str) -> str:
    """A part of the page; links point to its name."""
    return f'<section id="{escape(name)}"><h2>{escape(heading)}</h2>{"".join(parts)}</section>'


def paragraph(text: str) -> str:
    """Text."""
    return f"<p>{escape(text)}</p>"


def command(text: str) -> str:
    """A command line."""
    return f'<pre tabindex="0"><code>{escape(text)}</code></pre>'


def details(summary: str, content: str, *, is_open: bool) -> str:
    """Content that opens when its summary is clicked."""
    return f"<details{' open' if is_open else ''}><summary>{escape(summary)}</summary>{content}</details>"


def not_measured(subject: str, remedy: str) -> str:
    """A note that data are missing, and the command that adds them."""
    return f'<p class="missing"><strong>Not measured:</strong> {escape(subject)}. To add it:</p>{command(remedy)}'


def page(title: str, content: str, *, generator: str, style: str, script: str) -> str:
    """A whole document that loads nothing: its policy allows only its own style and script.

    ``style`` and ``script`` are our own and are not escaped.
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


def _number_class(column: Column, rows: Sequence[Any]) -> str:
    return ' class="number"' if any(isinstance(column.value_of(row), SupportsFloat) for row in rows) else ""


def _cell(column: Column, row: Any) -> str:
    value = column.value_of(row)
    if isinstance(value, SupportsFloat):
        return f'<td class="number" data-value="{float(value)}">{escape(column.text_of(row))}</td>'
    return f"<td>{escape(column.text_of(row))}</td>"
