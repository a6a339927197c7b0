"""The shapes of low-rank linears as text, for command lines and file names."""

from __future__ import annotations

import re
from typing import NamedTuple


class LinearShape(NamedTuple):
    """Shape of one low-rank linear."""

    K: int
    N: int
    R: int


GroupShape = tuple[LinearShape, ...]  # linears that share their input, so all have one K


def parse_shape(text: str) -> GroupShape:
    """Parse ``"4096x11008r298"``: K = 4096 to N = 11008 at rank 298; ``+`` joins linears that share their input.

    Raises:
        ValueError: if the text has another form, a size is 0, or the linears differ in K.
    """
    matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)r([1-9]\d*)", part) for part in text.split("+")]
    shape = tuple(LinearShape(*map(int, match.groups())) for match in matches if match)
    if len(shape) != len(matches) or len({linear.K for linear in shape}) != 1:
        raise ValueError(f"shape {text!r} is not KxNrR, such as 4096x11008r298, or several of one K joined by '+'")
    return shape


def format_shape(shape: GroupShape) -> str:
    """The text that ``parse_shape`` turns into ``shape``."""
    return "+".join(f"{K}x{N}r{R}" for K, N, R in shape)


def parse_forms(text: str, count: int) -> tuple[bool, ...]:
    """For each of ``count`` linears whether it is pivoted: ``"pivoted"``, or ``"pivoted+factored"`` for two.

    Raises:
        ValueError: if the text has another form.
    """
    names = text.split("+")
    if len(names) not in (1, count) or not {"factored", "pivoted"} >= set(names):
        raise ValueError(f"form {text!r} is not factored or pivoted, or one of them for each of {count} linears")
    return tuple(name == "pivoted" for name in names * (count // len(names)))


def format_forms(pivoted: tuple[bool, ...]) -> str:
    """The text that ``parse_forms`` turns into ``pivoted``."""
    names = ["pivoted" if one else "factored" for one in pivoted]
    return names[0] if len(set(names)) == 1 else "+".join(names)
