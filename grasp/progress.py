"""How long steps report what they have done: a callback, silent unless the caller gives one."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]  # (step, done, total)


def silent(step: str, done: int, total: int) -> None:
    """Report nothing."""
