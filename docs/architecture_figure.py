"""Draws the layers of the import contract into docs/_static/architecture.svg: run it after a change of the contract."""

from __future__ import annotations

import configparser
from html import escape
from pathlib import Path

ROOT = Path(__file__).parents[1]
FIGURE = ROOT / "docs/_static/architecture.svg"

WIDTH, MARGIN, BOX_HEIGHT, GAP, COLUMNS = 460, 12, 26, 8, 3
# The figure follows the page's colour scheme.
STYLE = """
text { font: 13px ui-monospace, monospace; fill: #1f2328; text-anchor: middle; dominant-baseline: central }
.note { font: 13px system-ui, sans-serif; fill: #57606a }
.layer { fill: #f3f5f8; stroke: #d0d7de }
.box { fill: #dbe9ff; stroke: #7aa7e9 }
.kernel { fill: #dff3e4; stroke: #74b586 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .note { fill: #9aa4af }
.layer { fill: #1c2128; stroke: #3d444d }
.box { fill: #1d3557; stroke: #4d7fc4 }
.kernel { fill: #1c3b28; stroke: #4b8f62 }
}
"""


def layers(contract: Path = ROOT / ".importlinter") -> list[list[str]]:
    """The layers of the import contract, the highest first, each with its packages."""
    parser = configparser.ConfigParser()
    parser.read(contract, encoding="utf-8")
    lines = parser["importlinter:contract:layers"]["layers"].split("\n")
    return [[name.strip() for name in line.split("|")] for line in lines if line.strip()]


def draw() -> str:
    """The figure as SVG."""
    parts: list[str] = []
    y = MARGIN
    for number, packages in enumerate(layers(), start=1):
        rows = [packages[i : i + COLUMNS] for i in range(0, len(packages), COLUMNS)]
        height = len(rows) * (BOX_HEIGHT + GAP) + GAP
        parts.append(_rectangle("layer", MARGIN, y, WIDTH - 2 * MARGIN, height))
        parts.append(_text("note", MARGIN + 18, y + height / 2, str(number)))
        for row, names in enumerate(rows):
            parts += _boxes("box", names, y + GAP + row * (BOX_HEIGHT + GAP))
        y += height + 6
    parts.append(_text("note", WIDTH / 2, y + 12, "↓ imports go down only; all layers may use the kernels ↓"))
    y += 26
    parts += _boxes("kernel", ["grasp_kernels: ops, dispatch, Triton"], y)
    parts += _boxes("kernel", ["csrc: C++ and CUDA on raw pointers"], y + BOX_HEIGHT + GAP)
    height = y + 2 * BOX_HEIGHT + GAP + MARGIN
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'aria-label="The layers of grasp, from grasp.cli down to grasp_kernels and csrc">\n<style>{STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def _boxes(kind: str, names: list[str], y: float) -> list[str]:
    left, space = MARGIN + 36, WIDTH - 2 * MARGIN - 36 - GAP
    width = (space - GAP * (len(names) - 1)) / len(names)
    parts = []
    for column, name in enumerate(names):
        x = left + column * (width + GAP)
        parts.append(_rectangle(kind, x, y, width, BOX_HEIGHT))
        parts.append(_text("name", x + width / 2, y + BOX_HEIGHT / 2, name.removeprefix("grasp.")))
    return parts


def _rectangle(kind: str, x: float, y: float, width: float, height: float) -> str:
    return f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="4"/>'


def _text(kind: str, x: float, y: float, text: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}</text>'


if __name__ == "__main__":
    FIGURE.write_text(draw(), encoding="utf-8")
