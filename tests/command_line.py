"""What the tests of the command line share: a tiny model on disk with a tokenizer, and ways to run a command."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import typer
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner, Result

from grasp import cli
from grasp.cli import root
from tests import forked
from tests.tiny_models import tiny_model
from tests.tiny_tokenizers import byte_tokenizer

ROOT = Path(__file__).parents[1]
MAIN = "from grasp.__main__ import main; main()"
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 20


class Outcome(NamedTuple):
    """The end of a command."""

    code: Any
    out: str
    err: str

    @property
    def text(self) -> str:
        """The output, without the line breaks of the terminal."""
        return " ".join(self.out.split())


RunMain = Callable[..., Outcome]


def save_tiny_model(folder: Path, *, nan: bool = False) -> Path:
    """A random three-layer Llama with a byte tokenizer; with ``nan``, one weight of its middle layer is NaN."""
    tokenizer = byte_tokenizer()
    model = tiny_model("llama", vocab_size=len(tokenizer))
    if nan:
        model.get_submodule("model.layers.1.mlp.up_proj").weight.data[0, 0] = float("nan")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def environment() -> dict[str, str]:
    """For subprocesses: the checkout is importable, the hub is not asked, and Triton kernels are not interpreted.

    Nor does a pytest among them take itself for a worker of pytest-xdist, in which pytest-benchmark times nothing.
    """
    path = os.pathsep.join(map(str, (ROOT, ROOT / "kernels", ROOT / "packages/pytest-speedgate")))
    left_out = ("TRITON_INTERPRET", "PYTEST_XDIST_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def grasp(*arguments: object, cwd: Path, processes: int = 1, fresh: bool = False) -> subprocess.CompletedProcess[str]:
    """Run ``grasp`` in forked processes as torchrun would, or in ``fresh`` ones that import everything anew."""
    words = [str(argument) for argument in arguments]
    if not fresh:
        together = torchrun_variables(processes) if processes > 1 else [{}]
        runs = forked.pythons(
            *(MAIN, words),
            cwd=cwd,
            environments=[environment() | variables for variables in together],
        )
        codes, outputs, errors = zip(*((run.returncode, run.stdout, run.stderr) for run in runs), strict=True)
        return subprocess.CompletedProcess(words, max(codes, key=abs), "".join(outputs), "".join(errors))
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), "-m", "grasp", *words],
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )


def grasp_below(limit: int, *arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run ``grasp`` where no file may have more than ``limit`` bytes."""
    code = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n{MAIN}"
    return forked.python(code, [str(argument) for argument in arguments], cwd=cwd, environment=environment())


def run_script(main: Callable[..., None], *arguments: object) -> Result:
    """Run the function of a script in this process, with the arguments of its command line."""
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})


def torchrun_variables(processes: int) -> list[dict[str, str]]:
    """What torchrun tells each of several processes on this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(probe.getsockname()[1]), "WORLD_SIZE": str(processes)}
    return [place | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def files(folder: Path) -> set[str]:
    """The paths of everything in a folder, relative to it."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *words: str) -> None:
    """Check that a command ended with exit code 2 and one line of error that has ``words``."""
    lines = outcome.err.splitlines()
    assert outcome.code == 2
    assert outcome.out == ""
    assert lines[-1].startswith("error: ")
    assert not any(line.startswith((" ", "Traceback", "error")) for line in lines[:-1])
    for word in words:
        assert word in lines[-1]


@pytest.fixture
def main(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[RunMain]:
    """Run the console script's function in this process; what it changes in the libraries is put back."""
    verbosity, hub = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name, value in root.QUIET.items():
        monkeypatch.setenv(name, value)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["grasp", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        return Outcome(ended.value.code, *capfd.readouterr())

    yield run
    transformers_logging.set_verbosity(verbosity)
    transformers_logging.enable_progress_bar()
    hub_logging.set_verbosity(hub)
