"""Handlers of signals for a while."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from types import FrameType


@contextmanager
def handling(handlers: Mapping[signal.Signals, Callable[[int, FrameType | None], object]]) -> Iterator[None]:
    """Inside the block these handlers get the signals, but none that is ignored, as SIGHUP is by ``nohup``."""
    before = {number: old for number in handlers if (old := signal.getsignal(number)) is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handlers[number])
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def ending_by_interrupt() -> AbstractContextManager[None]:
    """Inside the block SIGTERM and SIGHUP end it as Ctrl-C does: servers are stopped, temporary folders removed."""
    return handling(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), signal.default_int_handler))
