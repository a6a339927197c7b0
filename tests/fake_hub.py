"""A hub for tests: an HTTP server with the routes of an upload, which stores the files and can fail."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

TOKEN = "hf_aTokenThatMustNeverBeShown"


@dataclass
class FakeHub:
    """The content of the server, and its behaviour.

    Attributes:
        files: path in the repository → content, after all commits.
        blobs: sha256 → content of large files, committed or not.
        uploads: sha256 of each uploaded large file, in order.
        repositories: name → visibility.
        refuse_commits: number of commits that get a server error.
        answer: the only answer, if not ``None``.
        echo: text that every answer repeats in headers,
        echo_at: and that is the error of requests whose path has this part.
    """

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)
    uploads: list[str] = field(default_factory=list)
    repositories: dict[str, str] = field(default_factory=dict)
    refuse_commits: int = 0
    answer: object = None
    echo: str = ""
    echo_at: str = "nowhere"


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub at ``.address`` until the block ends."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    state: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            yaml.safe_load(json.loads(body)["content"].split("---")[1])
            self._answer({"errors": [], "warnings": []})
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._answer({"error": "Invalid credentials in Authorization header"}, 401)
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif "/preupload/" in path:
            self._answer({"files": [self._mode(file) for file in json.loads(body)["files"]]})
        elif path.endswith("/info/lfs/objects/batch"):
            self._answer({"transfer": "basic", "objects": [self._action(o) for o in json.loads(body)["objects"]]})
        elif path.startswith("/verify/"):
            self._answer({})
        elif "/commit/" in path:
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._answer({"error": f"no route {path}"}, 404)

    def do_GET(self) -> None:
        name = "/".join(self.path.partition("?")[0].split("/")[3:5])  # /api/models/owner/name
        if name not in self.state.repositories:
            self._answer({"error": "Repository not found"}, 404)
            return
        if "/tree/" in self.path:
            self._answer([{"type": "file", "path": path, "size": 1, "oid": "0" * 40} for path in self.state.files])
            return
        private = self.state.repositories[name] == "private"
        self._answer({"id": "", "modelId": "", "sha": "0" * 40, "siblings": [], "tags": [], "private": private})

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        name = hashlib.sha256(content).hexdigest()
        assert self.path == f"/blob/{name}"
        self.state.blobs[name] = content
        self.state.uploads.append(name)
        self._answer({})

    def _create(self, request: dict[str, Any]) -> None:
        name = f"{request['organization']}/{request['name']}"
        if request["organization"] == "somebody-else":
            self._answer({"error": "You don't have the rights to create a model under this namespace"}, 403)
            return
        exists = name in self.state.repositories
        visibility = self.state.repositories.setdefault(name, request.get("visibility", "public"))
        assert visibility in ("public", "private")
        self._answer({"url": f"{self.state.address}/{name}", "name": name}, 409 if exists else 200)

    @staticmethod
    def _mode(file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def _action(self, request: dict[str, Any]) -> dict[str, Any]:
        entry = {"oid": request["oid"], "size": request["size"]}
        if request["oid"] in self.state.blobs:
            return entry
        upload = {"href": f"{self.state.address}/blob/{request['oid']}", "header": {}}
        verify = {"href": f"{self.state.address}/verify/{request['oid']}", "header": {}}
        return {**entry, "actions": {"upload": upload, "verify": verify}}

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        if self.state.refuse_commits:
            self.state.refuse_commits -= 1
            self._answer({"error": "Internal error"}, 500)
            return
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.state.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.state.files[value["path"]] = self.state.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.state.files[value["path"]]
        repository = "/".join(self.path.split("/")[3:5])
        address = f"{self.state.address}/{repository}/commit/{'0' * 40}"
        self._answer({"success": True, "commitUrl": address, "commitOid": "0" * 40, "hookOutput": ""})

    def _answer(self, document: object, status: int = 200) -> None:
        echo = self.state.echo
        if self.state.answer is not None:
            document = self.state.answer
        if self.state.echo_at in self.path:
            document, status = {"error": echo, "errors": [{"message": echo}], "message": echo}, 400
        data = json.dumps(document).encode()
        self.send_response(status)
        for name in ("X-HF-Warning", "X-Error-Message", "X-Request-Id", "X-Error-Code") if echo else ():
            self.send_header(name, " ".join(echo.split()))
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
