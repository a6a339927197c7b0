"""The style of figures, and their export to SVG and PNG that are readable on light and on dark pages."""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from grasp.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Theme = Literal["light", "dark"]
Draw = Callable[[], "Figure"]

THEMES: tuple[Theme, ...] = ("light", "dark")
PAGES: dict[Theme, str] = {"light": "#ffffff", "dark": "#0d1117"}
INKS: dict[Theme, str] = {"light": "#1f2328", "dark": "#e6edf3"}  # colour of text and axes
# The colours of Okabe and Ito's palette with a contrast of at least 3 to both pages, and a grey. Markers differ too.
BLUE, VERMILLION, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#68707A"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 5.0  # inches; a phone shows it at three quarters of its size
_DPI = 200
_SALT = "grasp"  # makes the names inside an SVG reproducible


def require_matplotlib() -> None:
    """Check that matplotlib is installed.

    Raises:
        MissingPackageError: with the command that installs it.
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingPackageError(
            "figures need matplotlib, which is not installed; pip install 'grasp-llm[report]'"
        ) from error


@contextmanager
def themed(theme: Theme) -> Iterator[None]:
    """Inside the block matplotlib uses the colours of ``theme``."""
    import matplotlib as mpl

    ink = INKS[theme]
    colours = ("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color")
    settings: Any = {  # matplotlib types these keys as literals
        **dict.fromkeys((*colours, "grid.color", "legend.labelcolor"), ink),
        "axes.facecolor": "none",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.labelsize": 11,
        "axes.spines.right": False,
        "axes.spines.top": False,
        "axes.titlesize": 11,
        "figure.constrained_layout.use": True,
        "figure.facecolor": PAGES[theme],
        "font.family": "sans-serif",
        "font.sans-serif": ["DejaVu Sans"],  # part of matplotlib
        "font.size": 11,
        "grid.alpha": 0.15,
        "legend.fontsize": 10,
        "legend.frameon": False,
        "savefig.facecolor": "auto",
        "svg.fonttype": "none",
        "svg.hashsalt": _SALT,
        "text.parse_math": False,  # a $ in a name does not start a formula
        "xtick.labelsize": 10,
        "ytick.labelsize": 10,
    }
    with mpl.rc_context(settings):
        yield


def to_png(draw: Draw, theme: Theme) -> bytes:
    """A figure as PNG, on the page colour of ``theme``."""
    with themed(theme):
        buffer = io.BytesIO()
        draw().savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    return buffer.getvalue()


def to_svg(draw: Draw, *, name: str, title: str) -> str:
    """A figure as an ``<svg>`` element without background. Its ink is the text colour of the surrounding page.

    Args:
        draw: makes the figure.
        name: prefix of all names inside, so that one page can have several figures.
        title: read aloud by screen readers.
    """
    with themed("light"):
        buffer = io.StringIO()
        draw().savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"\s*<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(id="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = text.replace(INKS["light"], "currentColor")
    head, rest = text.split(">", 1)
    head = re.sub(r' (?:width|height)="[^"]*"', "", head)
    return f'{head} role="img" aria-label="{html.escape(title)}">{rest}'


def standalone(svg: str) -> str:
    """An ``<svg>`` of ``to_svg`` as a file. Its ink follows the reader's choice of light or dark."""
    rule = f"svg{{color:{INKS['light']}}}@media (prefers-color-scheme:dark){{svg{{color:{INKS['dark']}}}}}"
    head, rest = svg.split(">", 1)
    return f'<?xml version="1.0" encoding="utf-8"?>\n{head}><style>{rule}</style>{rest}\n'
