from __future__ import annotations

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import grasp
from grasp import cli
from tests import command_line
from tests.command_line import RunMain, assert_refused


def test_help_names_every_command_and_shows_examples() -> None:
    runner = CliRunner()
    result = runner.invoke(cli.app, ["--help"])
    assert result.exit_code == 0
    for command in ("compress", "evaluate", "inspect", "env", "demo"):
        assert command in result.output
        shown = runner.invoke(cli.app, [command, "--help"])
        assert shown.exit_code == 0
        assert f"$ grasp {command}" in shown.output


@pytest.mark.parametrize("command", ["ops", "model", "compress", "tune"])
def test_help_of_the_benchmarks_shows_examples(command: str) -> None:
    runner = CliRunner()
    assert re.search(rf"│ {command} ", runner.invoke(cli.app, ["bench", "--help"]).output)
    shown = runner.invoke(cli.app, ["bench", command, "--help"])
    assert shown.exit_code == 0
    assert f"$ grasp bench {command}" in shown.output


def test_version_is_the_one_of_the_distribution() -> None:
    result = CliRunner().invoke(cli.app, ["--version"])
    assert result.output == f"grasp {version('grasp-llm')}\n" == f"grasp {grasp.__version__}\n"


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys, grasp.cli; print([name for name in ('torch', 'transformers', 'numpy') if name in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], env=command_line.environment(), capture_output=True, text=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_of_the_package_exists() -> None:
    assert "compress_" in dir(grasp)
    for name in grasp.__all__:
        assert hasattr(grasp, name)
    with pytest.raises(AttributeError, match=r"has no attribute 'compres'; it has .*compress_"):
        grasp.compres  # noqa: B018


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["evaluate", "no/such-model"], ["no/such-model", "'builtin'"]),
        (["evaluate", "MODEL", "--text", "TEXT", "--window", "1"], ["window must be at least 2 positions, got 1"]),
        (["inspect", "nowhere"], ["config.json does not exist"]),
    ],
)
def test_other_commands_refuse_bad_input_alike(
    arguments: list[str], words: list[str], model: Path, text: Path, main: RunMain
) -> None:
    places = {"MODEL": model, "TEXT": text}
    assert_refused(main(*(places.get(argument, argument) for argument in arguments)), *words)


def test_an_option_that_does_not_exist_has_exit_code_2(main: RunMain) -> None:
    outcome = main("compress", "builtin", "-o", "out", "--num-layer", "2")
    assert outcome.code == 2
    assert "--num-layer" in outcome.err
    assert "Traceback" not in outcome.err


def test_traceback_shows_where_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["grasp", "--traceback", "compress", "builtin", "-o", "out", "--layers", "x"])
    with pytest.raises(ValueError, match="layers must be numbers"):
        cli.main()
