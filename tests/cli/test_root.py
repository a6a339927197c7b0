from __future__ import annotations

import re
import stat
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import pytest
from typer.testing import CliRunner

import grasp
from grasp import cli
from grasp.__main__ import main as start
from grasp.checkpoint import inspection
from grasp.cli import root
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


@pytest.mark.parametrize("command", ["ops", "model", "tune"])
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
        (["evaluate", "MODEL", "--text", "TEXT", "--window", "1"], ["--window must be at least 2 positions, got 1"]),
        (["inspect", "nowhere"], ["no folder nowhere"]),
    ],
)
def test_other_commands_refuse_bad_input_alike(
    arguments: list[str], words: list[str], model: Path, text: Path, main: RunMain
) -> None:
    places = {"MODEL": model, "TEXT": text}
    assert_refused(main(*(places.get(argument, argument) for argument in arguments)), *words)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("bits='auto' needs target_bytes or target_latency", "--bits auto needs --target-bytes or --target-latency"),
        ("0..2 has the layers, got layers=[1, 2]", "0..2 has the layers, got --layers [1, 2]"),
        ("give one of layers, num_layers", "give one of --layers, --num-layers"),
        ("window must be 2", "--window must be 2"),
        ("pass them to read_results", "pass them to read_results"),
        ("no file num_layers/seq_len.txt of hidden_size=64", "no file num_layers/seq_len.txt of hidden_size=64"),
    ],
)
def test_an_error_names_options(
    text: str, shown: str, main: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(directory: Path) -> None:
        raise ValueError(text)

    monkeypatch.setattr(inspection, "inspect_checkpoint", fail)
    assert main("inspect", tmp_path).err == f"error: {shown}\n"


def test_an_option_that_does_not_exist_has_exit_code_2(main: RunMain) -> None:
    outcome = main("compress", "builtin", "-o", "out", "--num-layer", "2")
    assert outcome.code == 2
    assert "--num-layer" in outcome.err
    assert "Traceback" not in outcome.err


def test_the_home_folder_is_found_behind_an_equals_sign(main: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setattr(root, "app", lambda words, **_: given.append(words))
    main("bench", "costs", "--output=~/c.json", "a=~/b", "--", "--output=~/kept")
    assert given == [["bench", "costs", "--output=/home/ada/c.json", "a=~/b", "--", "--output=~/kept"]]


def test_traceback_shows_where_an_error_was_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["grasp", "--traceback", "compress", "builtin", "-o", "out", "--layers", "x"])
    with pytest.raises(ValueError, match="layers must be numbers"):
        cli.main()


@pytest.mark.parametrize("error", [KeyError("a\x1b[31m[/b]"), RecursionError("deep"), MemoryError(), AssertionError()])
def test_an_unexpected_error_is_one_line_and_its_traceback_is_in_a_private_file(
    error: Exception, main: RunMain, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(directory: Path) -> None:
        raise error

    monkeypatch.setattr(inspection, "inspect_checkpoint", fail)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    outcome = main("inspect", "a\udcff")
    assert outcome.code == 70
    assert outcome.out == ""
    assert outcome.err.replace("\n", "", 1).isprintable()
    (log,) = tmp_path.iterdir()
    assert outcome.err.startswith(f"error: {type(error).__name__}")
    assert str(log) in outcome.err
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    text = log.read_text()
    for words in (f"grasp {grasp.__version__}", f"torch {version('torch')}", "inspect 'a\\udcff'", "in fail"):
        assert words in text


def test_without_a_place_for_the_file_the_line_names_the_option_that_shows_the_traceback(
    main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "inspect_checkpoint", {}.__getitem__)
    monkeypatch.setattr(tempfile, "mkstemp", lambda *_: Path("/dev/null/none").read_bytes())
    outcome = main("inspect", "folder")
    assert outcome.code == 70
    assert len(outcome.err.splitlines()) == 1
    assert "--traceback" in outcome.err


def test_ctrl_c_is_one_line(main: RunMain, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(directory: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(inspection, "inspect_checkpoint", interrupted)
    assert main("inspect", "folder") == (130, "", "interrupted\n")


def test_ctrl_c_during_the_imports_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(name: str, *_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("builtins.__import__", interrupted)
    with pytest.raises(SystemExit) as ended:
        start()
    monkeypatch.undo()
    assert ended.value.code == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    "arguments", [["evaluate", "~nobody-of-this-name/m"], ["evaluate", "~nobody-of-this-name/m.gguf"]]
)
def test_the_folder_of_a_user_who_does_not_exist_is_refused(arguments: list[str], main: RunMain) -> None:
    assert_refused(main(*arguments), "~nobody-of-this-name/m")


@pytest.mark.parametrize("arguments", [["\x1b[0m"], ["env", "--\x1b]0;x\x07"], ["env", "[/b]\u202e"]])
def test_the_boxes_of_typer_have_no_control_characters(arguments: list[str], main: RunMain) -> None:
    outcome = main(*arguments)
    assert outcome.code == 2
    assert outcome.err.replace("\n", "").isprintable()


@pytest.mark.parametrize(("redirection", "code"), [("> /dev/full", 2), (">&-", 0), ("| true", 1)])
def test_a_stdout_that_cannot_be_written_gives_no_traceback(redirection: str, code: int, tmp_path: Path) -> None:
    script = f"set -o pipefail; {sys.executable} -m grasp --version {redirection}"
    run = subprocess.run(
        ["bash", "-c", script], env=command_line.environment(), cwd=tmp_path, capture_output=True, text=True
    )
    assert run.returncode in (code, 0 if "|" in redirection else code)  # true may end after grasp has written
    assert len(run.stderr.splitlines()) == (code == 2)


def test_a_stderr_that_cannot_be_written_changes_no_exit_code(tmp_path: Path) -> None:
    for words in ("inspect nothing", "inspect --nothing"):
        command = f"{sys.executable} -m grasp {words} 2> /dev/full"
        assert subprocess.run(["bash", "-c", command], env=command_line.environment(), cwd=tmp_path).returncode == 2


def test_the_command_to_record_may_have_empty_arguments(main: RunMain, tmp_path: Path) -> None:
    outcome = main("bench", "record", "-o", tmp_path / "w.json", "--", "sh", "-c", "exit 3", "")
    assert outcome.code == 3
    assert "empty value" not in outcome.err
