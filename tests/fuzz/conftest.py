from __future__ import annotations

from tests.command_line import main

__all__ = ["main"]
