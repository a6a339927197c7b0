"""Reads damaged checkpoints for ``test_checkpoints.py``, in a process of its own with limited memory."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shutil
import sys
import tempfile
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from huggingface_hub import constants
from transformers import AutoModelForCausalLM

from grasp import cli
from grasp.cli import root
from tests.fake_hub import TOKEN, fake_hub

MEMORY = 3 * 2**30  # bytes of address space beyond those of the imported libraries
_LONGEST_OUTPUT = 100_000


def auto_model(folder: Path) -> str:
    """Load with plain transformers: the digest of the logits, or ``refused`` with the exception."""
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            logits = model(torch.arange(3, 19)[None]).logits
        return f"accepted {hashlib.sha256(logits.float().numpy().tobytes()).hexdigest()[:12]}"
    except Exception as error:  # noqa: BLE001 - any exception is a refusal; only a crash is none
        return f"refused {type(error).__name__}: {str(error)[:200]}"


def command(*arguments: str) -> str:
    """Run ``grasp``: ``accepted``, ``refused`` with the error, or ``FAULT`` with what is wrong."""
    sys.argv = ["grasp", *arguments]
    code: object = None
    with tempfile.TemporaryFile("w+", errors="replace") as out, tempfile.TemporaryFile("w+", errors="replace") as err:
        saved = os.dup(1), os.dup(2)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        try:
            cli.main()
        except SystemExit as ended:
            code = ended.code
        finally:
            for number, stream in enumerate((sys.stdout, sys.stderr), start=1):
                stream.flush()
                os.dup2(saved[number - 1], number)
                os.close(saved[number - 1])
        out.seek(0)
        err.seek(0)
        return _judged(code, out.read(), err.read())


def _judged(code: object, out: str, err: str) -> str:
    lines = err.splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    faults = [
        *([f"exit code {code}"] if code not in (0, root.BAD_INPUT) else []),
        *(["a traceback"] if "Traceback" in err else []),
        *([f"{len(errors)} lines of error"] if code == root.BAD_INPUT and errors != lines[-1:] else []),
        *(["the token"] if TOKEN in out + err else []),
        *(["much output"] if len(out + err) > _LONGEST_OUTPUT else []),
        *(["control characters"] if any(not c.isprintable() and c != "\n" for c in out + err) else []),
    ]
    if faults:
        return f"FAULT {', '.join(faults)}: {err[-1500:]!r}"
    return "accepted" if code == 0 else f"refused {lines[-1][:300]}"


def readers(scratch: Path) -> dict[str, Callable[[Path], str]]:
    """All readers by name; they write into ``scratch``."""
    text, out = scratch / "text.txt", scratch / "out"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 8)
    train = ("--text", str(text), "--tokens", "64", "--seq-len", "16", "--batch-size", "2")
    return {
        "AutoModel": auto_model,
        "inspect": lambda folder: command("inspect", str(folder)),
        "report": lambda folder: command("report", str(folder), "-o", str(out.with_suffix(".html"))),
        "evaluate": lambda folder: command("evaluate", str(folder), "--text", str(text), "--window", "64"),
        "recover": lambda folder: command("recover", str(folder), "-o", str(out), *train),
        "convert": lambda folder: command("convert", str(folder), "-o", str(out), "--to", "factored"),
        "push": lambda folder: command("push", str(folder), "someone/small"),
    }


def serve(connection: Connection, place: Path) -> None:
    """Answer requests until the connection closes: (folder, names of readers) → {reader: outcome}."""
    tempfile.tempdir = str(place)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))
    os.environ |= {**root.QUIET, "HF_TOKEN": TOKEN}
    with tempfile.TemporaryDirectory() as name, fake_hub() as hub, open(os.devnull, "w") as nowhere:
        scratch = Path(name)
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", closefd=False) for number in (1, 2))
        constants.ENDPOINT, constants.HF_HUB_DISABLE_XET, constants.HF_HUB_OFFLINE = hub.address, True, False
        table = readers(scratch)
        while True:
            folder, names = connection.recv()
            outcomes = {}
            for reader in names:
                outcomes[reader] = table[reader](folder)
                for path in scratch.glob("out*"):
                    with contextlib.suppress(OSError):
                        shutil.rmtree(path) if path.is_dir() else path.unlink()
            connection.send(outcomes)
