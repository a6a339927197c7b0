from __future__ import annotations

import io
import itertools
import re
import sys
from functools import partial
from xml.etree import ElementTree

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread

from grasp.errors import MissingPackageError
from grasp.reporting.figure_style import (
    COLOURS,
    INKS,
    MARKERS,
    PAGES,
    THEMES,
    Theme,
    require_matplotlib,
    standalone,
    to_png,
    to_svg,
)

# Machado, Oliveira, Fernandes 2009, severity 1: linear RGB as those see it who lack a kind of cone.
DEFICIENCIES = {
    "none": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    values = np.array(to_rgb(colour))
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """As WCAG 2 defines it."""
    low, high = sorted(float(TO_XYZ[1] @ linear(colour)) for colour in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, deficiency: str) -> np.ndarray:
    seen = (np.array(DEFICIENCIES[deficiency]) @ linear(colour)).clip(0, 1)
    x, y, z = np.cbrt((TO_XYZ @ seen) / TO_XYZ.sum(1) + 1e-4)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def drawing(text: str = "a") -> Figure:
    figure = Figure(figsize=(2, 1))
    axes = figure.subplots()
    axes.plot([1, 2], [3, 4], "o", label=text)
    axes.set_title(text)
    return figure


@pytest.mark.parametrize("theme", THEMES)
def test_every_colour_stands_out_from_both_pages(theme: Theme) -> None:
    assert contrast(INKS[theme], PAGES[theme]) > 7
    for colour in COLOURS:
        assert contrast(colour, PAGES[theme]) >= 3


@pytest.mark.parametrize("deficiency", DEFICIENCIES)
def test_no_two_colours_look_alike_to_the_colour_blind(deficiency: str) -> None:
    for one, other in itertools.combinations(COLOURS, 2):
        assert np.linalg.norm(lab(one, deficiency) - lab(other, deficiency)) > 12, (one, other)


def test_markers_and_colours_make_as_many_pairs_as_there_can_be() -> None:
    assert np.gcd(len(COLOURS), len(MARKERS)) == 1


def test_an_svg_takes_its_ink_and_its_page_from_around_it() -> None:
    svg = to_svg(drawing, name="mine", title='a "<figure>"')
    root = ElementTree.fromstring(svg)
    assert root.attrib["aria-label"] == 'a "<figure>"'
    assert root.attrib["role"] == "img"
    assert "width" not in root.attrib
    assert "currentColor" in svg
    assert INKS["light"] not in svg
    assert PAGES["light"] not in svg
    assert "metadata" not in svg


def test_names_inside_an_svg_are_its_own_and_all_that_are_used_are_there() -> None:
    svg = to_svg(drawing, name="mine", title="a")
    names = re.findall(r'\bid="([^"]*)"', svg)
    used = re.findall(r'href="#([^"]*)"', svg) + re.findall(r"url\(#([^)]*)\)", svg)
    assert used
    assert len(set(names)) == len(names)
    assert set(used) <= set(names)
    assert all(name.startswith("mine-") for name in names)


def test_an_svg_is_the_same_each_time() -> None:
    assert to_svg(drawing, name="a", title="b") == to_svg(drawing, name="a", title="b")


def test_signs_of_formulas_and_of_markup_are_shown_as_text() -> None:
    svg = to_svg(partial(drawing, "$a_1$ <b>&"), name="a", title="b")
    assert "$a_1$ <b>&" in ElementTree.fromstring(svg).itertext()


def test_a_file_of_its_own_follows_the_reader() -> None:
    text = standalone(to_svg(drawing, name="a", title="b"))
    ElementTree.fromstring(text)
    assert text.startswith("<?xml")
    assert f"(prefers-color-scheme:dark){{svg{{color:{INKS['dark']}}}}}" in text


@pytest.mark.parametrize("theme", THEMES)
def test_a_png_has_the_page_of_its_theme(theme: Theme) -> None:
    pixels = imread(io.BytesIO(to_png(drawing, theme)), format="png")
    np.testing.assert_allclose(pixels[0, 0, :3], to_rgb(PAGES[theme]), atol=1 / 255)
    ink = np.abs(pixels[..., :3] - to_rgb(INKS[theme])).sum(-1).min()
    assert ink < 0.02


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'grasp-llm\[report\]'"):
        require_matplotlib()
