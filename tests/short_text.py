"""Shortens the built-in texts, which are tokenized whole for a few sequences of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from grasp import calibration


def shorten(set_attribute: Callable[[Any, str, Any], None] = setattr) -> None:
    """Leave 50 000 characters of Wikipedia, and 20 000 of each kind for calibration."""
    articles = calibration._wikipedia
    set_attribute(calibration, "_wikipedia", lambda split: articles(split)[:50_000])
    set_attribute(calibration, "_KIND", 20_000)
