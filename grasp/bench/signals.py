"""Handlers of signals for a while."""

from __future__ import annotations

import os
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
    """Inside the block SIGTERM and SIGHUP end it as Ctrl-C does: servers are stopped, temporary folders removed.

    Processes that are forked in the block inherit the handlers. They end without a traceback, as by the signal itself.
    """
    process = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # such as a worker of lm-eval, which its pool ends so
            os._exit(128 + number)
        signal.default_int_handler(number, frame)

    return handling(dict.fromkeys((signal.SIGTERM, signal.SIGHUP), end))
