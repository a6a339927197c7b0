"""Servers with the OpenAI interface: vLLM in a process of its own, or a server that runs already."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from grasp.errors import ServerError
from grasp.formatting import one_line, size
from grasp.reading import LIMIT, parse_json

HOST = "127.0.0.1"  # of servers that this process starts
WITHOUT_PROXY = (HOST, "localhost")
COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
ANSWER_SECONDS, COMPLETION_SECONDS = 30, 600  # a server may still compile at its first completion
_PIECE = 1 << 16  # bytes of an answer that are read at a time
_POLL_SECONDS = 0.2
_GRACE_SECONDS = 10  # between the request to end and the kill
_LAST_BYTES, _LAST_LINES = 1 << 15, 10  # of a log


class Process:
    """A command in a process group of its own. Leaving the ``with`` block ends the command and all its children.

    Args:
        command: the command with its arguments.
        log: a new file for its output.
        offline: whether it must not ask the hub, because it needs local files only.
    """

    def __init__(self, command: Sequence[str], log: Path, *, offline: bool) -> None:
        self._log = log
        direct = ",".join(filter(None, (os.environ.get("no_proxy") or os.environ.get("NO_PROXY"), *WITHOUT_PROXY)))
        with log.open("w") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, "no_proxy": direct, **({"HF_HUB_OFFLINE": "1"} if offline else {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    @property
    def exit_code(self) -> int | None:
        """``None`` while the command runs."""
        return self._process.poll()

    @property
    def last_lines(self) -> str:
        """The end of its output on one line, without indented lines: those are mostly the frames of a traceback."""
        with self._log.open("rb") as log:
            log.seek(max(0, self._log.stat().st_size - _LAST_BYTES))
            lines = [line for line in log.read().decode(errors="replace").splitlines() if line[:1].strip()]
        return "its last lines: " + " | ".join(lines[-_LAST_LINES:]) if lines else "it printed nothing"


@dataclass(frozen=True)
class Server:
    """A server that answers."""

    name: str  # its name in results
    url: str  # its address, without the path
    model: str  # id of its model
    version: str | None  # version of vLLM; ``None`` if the server does not tell
    process: Process | None = None  # its process; ``None`` if it was not started here

    def log_probabilities(self, tokens: Sequence[int]) -> list[float]:
        """The log-probability of each token of a prompt but the first, then of the token that follows.

        Raises:
            ServerError: if there is no answer, or it has other numbers than these, all finite.
        """
        asked = {"model": self.model, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "ignore_eos": True}
        answer = fetch(f"{self.url}/v1/completions", {**asked, "echo": True, "logprobs": 1})
        with _expected_fields(self.url, answer):
            values: list[Any] = answer["choices"][0]["logprobs"]["token_logprobs"][1:]
        if len(values) != len(tokens) or not all(isinstance(value, (int, float)) for value in values):
            raise ServerError(f"{self.url} has {len(values)} log-probabilities; expected {len(tokens)} numbers")
        return values


def connect(url: str) -> Server:
    """The server at an address, named as its model.

    Raises:
        ServerError: if it does not answer as a server with the OpenAI interface does.
    """
    models = fetch(f"{url}/v1/models")
    with _expected_fields(url, models):
        identity = str(models["data"][0]["id"])
    version = None
    with contextlib.suppress(ServerError):
        version = fetch(f"{url}/version").get("version")
    return Server(Path(identity).name, url, identity, version)


def start(process: Process, name: str, url: str, limit: float) -> Server:
    """Wait at most ``limit`` seconds until the server that ``process`` runs answers with the model ``name``.

    Raises:
        ServerError: if the process ends, or the limit is exceeded; the message has the end of its log.
    """
    deadline = time.monotonic() + limit
    while process.exit_code is None:
        with contextlib.suppress(ServerError):
            server = connect(url)
            if server.model == name:  # and no other program was faster at the port
                return replace(server, name=name, process=process)
        if time.monotonic() > deadline:
            raise ServerError(
                f"the server of {name} does not answer after {limit:g} s; if it needs longer, raise --time-limit; "
                + process.last_lines
            )
        time.sleep(_POLL_SECONDS)
    raise ServerError(f"the server of {name} ended with exit code {process.exit_code}; {process.last_lines}")


def finish(client: Process, server: Server, limit: float) -> None:
    """Wait until a client of a server has ended.

    Raises:
        ServerError: if it fails, the server ends before it, or ``limit``, in seconds, is exceeded; the message has the
            end of a log.
    """
    deadline = time.monotonic() + limit
    while client.exit_code is None:
        if server.process is not None and (code := server.process.exit_code) is not None:
            raise ServerError(f"the server of {server.name} ended with exit code {code}; {server.process.last_lines}")
        if time.monotonic() > deadline:
            remedy = "if it needs longer, raise --time-limit"
            raise ServerError(f"the client has not ended after {limit:g} s; {remedy}; {client.last_lines}")
        time.sleep(_POLL_SECONDS)
    if client.exit_code != 0:
        raise ServerError(f"the client of {server.name} ended with exit code {client.exit_code}; {client.last_lines}")


def free_port() -> int:
    """A port of this machine that no program uses at the moment."""
    with socket.socket() as free:
        free.bind((HOST, 0))
        port: int = free.getsockname()[1]
    return port


def fetch(url: str, body: object = None) -> dict[str, Any]:
    """The JSON object that a server answers; ``body`` is posted as JSON, ``None`` gets.

    Raises:
        ServerError: if there is no such answer.
    """
    return parse_json(fetch_text(url, body), url, "the JSON of an OpenAI server", ServerError)


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: object) -> None:
        """Leave the answer as it is, which counts as an error."""


def fetch_text(url: str, body: object = None) -> str:
    """The text that a server answers; arguments and errors are those of ``fetch``. No proxy to this machine.

    An answer has a limited size and time, and must come from the address that the user gave.
    """
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    try:
        direct = [urllib.request.ProxyHandler({})] if urlsplit(url).hostname in WITHOUT_PROXY else []
        timeout = ANSWER_SECONDS if body is None else COMPLETION_SECONDS
        deadline, content = time.monotonic() + timeout, bytearray()
        with urllib.request.build_opener(*direct, _NoRedirects).open(request, timeout=timeout) as answer:
            while piece := answer.read1(_PIECE):
                content += piece
                if len(content) > LIMIT:
                    raise ValueError(f"its answer has more than {size(LIMIT)}")
                if time.monotonic() > deadline:
                    raise TimeoutError(f"its answer takes more than {timeout} s")
        return content.decode()
    except urllib.error.HTTPError as error:
        reason = error.read1(_PIECE).decode(errors="replace")
        raise ServerError(f"{url} answers HTTP {error.code}: {one_line(reason)}; expected 200") from error
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise ServerError(
            f"{url} does not answer ({one_line(error)}); expected a server with the OpenAI interface, such as vLLM"
        ) from error


@contextlib.contextmanager
def _expected_fields(url: str, answer: object) -> Any:
    try:
        yield
    except (LookupError, TypeError, AttributeError) as error:
        text = one_line(json.dumps(answer))
        raise ServerError(f"{url} answers {text}; expected the fields of the OpenAI interface") from error
