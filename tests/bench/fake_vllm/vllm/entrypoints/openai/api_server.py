"""A server that answers as vLLM does, all tokens equally likely. A file ``fault`` in the folder makes it fail."""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--model", type=Path)
parser.add_argument("--served-model-name")
parser.add_argument("--port", type=int)
arguments, others = parser.parse_known_args()
folder = arguments.model
fault = (folder / "fault").read_text() if (folder / "fault").exists() else ""
VALUE = -math.log(json.loads((folder / "config.json").read_text())["vocab_size"])


class Handler(BaseHTTPRequestHandler):
    def answer(self, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        if self.path == "/version":
            self.answer({"version": "0.0"})
        else:
            self.answer({"data": [{"id": arguments.served_model_name, "root": "/not/what/the/client/loads"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        values = [None, *[VALUE] * len(asked["prompt"])]
        choice = {"text": "", "logprobs": {"token_logprobs": values}}
        self.answer({"choices": [choice], "usage": {"completion_tokens": asked["max_tokens"]}})

    def log_message(self, *_: object) -> None:
        pass


if fault:
    print("loading", flush=True)
if fault == "hangs":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
(folder / "processes").write_text(f"{os.getpid()} {child.pid}")
if fault == "dies":
    print("  File a.py\nValueError: a tensor is missing", flush=True)
    os._exit(3)
if fault == "hangs":
    time.sleep(60)
HTTPServer(("127.0.0.1", arguments.port), Handler).serve_forever()
