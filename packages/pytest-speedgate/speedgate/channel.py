"""Messages between two processes: JSON, one line each."""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from typing import Any


class ClosedError(Exception):
    """The other process has ended."""


class Channel:
    """One end of a pair of connected sockets."""

    def __init__(self, end: socket.socket) -> None:
        self._file = end.makefile("rw", encoding="utf-8", newline="\n")
        end.close()  # the file keeps it open

    def send(self, *message: Any) -> None:
        """Send a message.

        Raises:
            ClosedError: if nobody reads it.
        """
        try:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()
        except OSError as error:
            raise ClosedError from error

    def receive(self) -> list[Any]:
        """Wait for a message.

        Raises:
            ClosedError: if there will be none.
        """
        try:
            line = self._file.readline()
        except OSError as error:
            raise ClosedError from error
        if not line:
            raise ClosedError
        return json.loads(line)

    def close(self) -> None:
        """End the conversation."""
        with suppress(OSError):  # what was not yet sent has no reader
            self._file.close()
