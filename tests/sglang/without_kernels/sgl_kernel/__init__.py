"""A stand-in for SGLang's CPU kernels, which no package brings: SGLang imports them, and here computes without them.

On CPUs without AMX, SGLang calls none of them for the models of these tests.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn


def __getattr__(name: str) -> Callable[..., NoReturn]:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*_: object, **__: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} was called, which these tests do not have")

    return missing
