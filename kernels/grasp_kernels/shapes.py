"""How the shapes of low-rank linears are written where people type them."""

from __future__ import annotations

import re
from typing import NamedTuple


class LinearShape(NamedTuple):
    """Shape of one low-rank linear."""

    K: int
    N: int
    R: int


GroupShape = tuple[LinearShape, ...]  # all of one K


def parse_shape(text: str) -> GroupShape:
    """``"4096x11008r298"`` is K = 4096 to N = 11008 at rank 298; linears that share their input are joined by ``+``.

    Raises:
        ValueError: if that is not how it is written, a size is 0, or the inputs differ in width.
    """
    matches = [re.fullmatch(r"([1-9]\d*)x([1-9]\d*)r([1-9]\d*)", part) for part in text.split("+")]
    shape = tuple(LinearShape(*map(int, match.groups())) for match in matches if match)
    if len(shape) != len(matches) or len({linear.K for linear in shape}) != 1:
        raise ValueError(f"shape {text!r} is not KxNrR, such as 4096x11008r298, or several of one K joined by '+'")
    return shape


def format_shape(shape: GroupShape) -> str:
    """Undo ``parse_shape``."""
    return "+".join(f"{K}x{N}r{R}" for K, N, R in shape)
