from __future__ import annotations

import pytest

from grasp_kernels.shapes import LinearShape, format_forms, format_shape, parse_forms, parse_shape

GROUP = parse_shape("48x32r5+48x16r3")


def test_parsing_and_formatting_shapes_round_trip() -> None:
    assert (LinearShape(48, 32, 5), LinearShape(48, 16, 3)) == GROUP
    assert format_shape(GROUP) == "48x32r5+48x16r3"


@pytest.mark.parametrize("text", ["", "48x32", "48x32r0", "48x32r5+", "x48x32r5", "48x32r5+64x32r5", "48 x 32 r 5"])
def test_other_shapes_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="KxNrR"):
        parse_shape(text)


@pytest.mark.parametrize("text", ["factored", "pivoted", "pivoted+factored"])
def test_parsing_and_formatting_forms_round_trip(text: str) -> None:
    assert format_forms(parse_forms(text, 2)) == text


@pytest.mark.parametrize("text", ["", "round", "pivoted+factored+pivoted"])
def test_other_forms_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="for each of 2 linears"):
        parse_forms(text, 2)
