from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import namedtuple
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging
from typer.testing import CliRunner

import grasp
from grasp import cli
from grasp.checkpoint import saving as checkpoint
from grasp.cli import arguments, root
from tests import command_line
from tests.command_line import save_tiny_model

Outcome = namedtuple("Outcome", "code out err")
RunMain = Callable[..., Outcome]
TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 20


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


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


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def assert_refused(outcome: Outcome, *words: str) -> None:
    lines = outcome.err.splitlines()
    assert outcome.code == 2
    assert outcome.out == ""
    assert lines[-1].startswith("error: ")
    assert not any(line.startswith((" ", "Traceback", "error")) for line in lines[:-1])
    for word in words:
        assert word in lines[-1]


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
    ("text", "layers"), [("3", (3,)), ("3,12-15, 17", (3, 12, 13, 14, 15, 17)), ("2-2", (2,)), ("5,1", (5, 1))]
)
def test_layers_are_numbers_and_ranges(text: str, layers: tuple[int, ...]) -> None:
    assert arguments.parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "3-", "5-3", "-1", "1,,2", "1.5"])
def test_other_layers_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"such as 3,12-17, got {text!r}")):
        arguments.parse_layers(text)


@pytest.mark.parametrize("text", ["0-99999999999", "10000", "1,9999-10000"])
def test_numbers_beyond_any_model_are_refused_before_ranges_are_written_out(text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"layers must be below 10000, got {text!r}")):
        arguments.parse_layers(text)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--compression-ratio", "1.5"], ["compression_ratio must be in [0, 1), got 1.5"]),
        (["--retain-ratio", "0"], ["retain_ratio must be in (0, 1], got 0"]),
        (["--num-layers", "2", "--compression-ratio", "0.2"], ["num_layers and compression_ratio exclude each other"]),
        (["--layers", "1-9"], ["decoder layers 0..2, got layers=[1, 2, 3"]),
        (["--num-layers", "4"], ["3 decoder layers, got num_layers=4"]),
        (["--compression-ratio", "0.9"], ["the largest possible ratio is"]),
        (["--preset", "papre"], ["preset must be one of best, paper, got 'papre'"]),
        (["--preset", "paper", "--metric", "size"], ["metric must be one of taylor, gradient in paper, got 'size'"]),
        (["--metric", "gradient"], ["--metric is an option of --preset paper, got --preset best"]),
        (["--preset", "paper", "--refit"], ["--refit is an option of --preset best, got --preset paper"]),
        (["--costs", "H100"], ["costs='H100' needs target_latency"]),
        (["--dry-run", "--costs", "H100"], ["costs='H100' needs target_latency"]),
        (["--dry-run", "--target-latency", "0.5", "--costs", "H9000"], ["'H9000'"]),
        (["--dry-run", "--target-latency", "0.001", "--costs", "H100"], ["target_latency=0.001 cannot be reached"]),
        (["--dry-run", "--shard"], ["leave out --shard"]),
        (["--num-samples", "1000"], ["the text has 1520 tokens; 1000 samples of 32 need 32000"]),
        (["--seq-len", "1"], ["seq_len must be at least 2, got 1"]),
        (["--calibration", "no-such.txt"], ["no text file no-such.txt; expected a path or one of wikitext2"]),
        (["--dtype", "int7"], ["dtype must be one of auto, float32", "got 'int7'"]),
        (["--device", "toaster"], ["device must be a name such as cpu, cuda", "got 'toaster'"]),
    ],
    ids=lambda value: " ".join(value) if value and value[0].startswith("--") else "",
)
def test_bad_input_ends_in_one_line_and_writes_nothing(
    options: list[str], words: list[str], model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    before = files(tmp_path)
    common = ["--calibration", text, "--num-samples", 2, "--seq-len", 32]
    assert_refused(main("compress", model, "-o", tmp_path / "out" / "small", *common, *options), *words)
    assert files(tmp_path) == before


def test_an_output_folder_with_something_in_it_is_refused_before_the_model_is_looked_for(
    tmp_path: Path, main: RunMain
) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    for options in ([], ["--dry-run"]):
        refused = main("compress", "no/such-model", "-o", tmp_path, *options)
        assert_refused(refused, "is not empty", "mine.txt", "give a new or an empty folder")
    assert files(tmp_path) == {"mine.txt"}


def test_a_full_disk_is_noticed_before_the_long_work(
    model: Path, text: Path, tmp_path: Path, main: RunMain, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1, 1))
    refused = main(
        "compress", model, "-o", tmp_path / "out", "--calibration", text, "--num-samples", 2, "--seq-len", 32
    )
    assert_refused(refused, "GB are free")
    assert "block influence" not in refused.err
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(text: Path, tmp_path: Path, main: RunMain) -> None:
    broken = save_tiny_model(tmp_path / "broken", nan=True)
    before = files(tmp_path)
    options = ["--calibration", text, "--num-samples", 2, "--seq-len", 32, "--num-layers", 1]
    assert_refused(main("compress", broken, "-o", tmp_path / "out", *options), "NaN or infinite")
    assert files(tmp_path) == before


def test_the_perplexity_of_a_broken_model_is_reported_not_dropped(text: Path, tmp_path: Path, main: RunMain) -> None:
    broken = save_tiny_model(tmp_path / "broken", nan=True)
    outcome = main("evaluate", broken, "--text", text, "--window", 64, "--json")
    result = json.loads(outcome.out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))["result"]
    assert outcome.code == 2
    assert result["perplexity"] is None
    assert result["nonfinite"] == result["tokens"] > 0
    message = f"error: {result['tokens']} of {result['tokens']} tokens have a loss that is NaN or infinite"
    assert outcome.err.splitlines()[-1].startswith(message)
    table = main("evaluate", broken, "--text", text, "--window", 64)
    assert table.code == 2
    assert "perplexity" in table.out


def test_the_window_shown_is_the_one_used(model: Path, text: Path, main: RunMain) -> None:
    result = json.loads(main("evaluate", model, "--text", text, "--window", 5000, "--json").out)["result"]
    assert (result["window"], result["stride"]) == (128, 128)  # the positions that the model has
    assert "windows of 128, 128 new in each" in " ".join(
        main("evaluate", model, "--text", text, "--window", 5000).out.split()
    )


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


def test_compress_evaluate_and_inspect_agree_with_each_other(
    model: Path, text: Path, tmp_path: Path, main: RunMain
) -> None:
    out = tmp_path / "small"
    options = ["--num-samples", 3, "--seq-len", 32, "--layers", "0,2", "--retain-ratio", 0.4, "--batch-size", 2]
    compressed = json.loads(main("compress", model, "-o", out, "--calibration", text, *options, "--json").out)
    report = compressed["report"]
    assert report["redundant_layers"] == [0, 2]
    assert report["config"]["retain_ratio"] == 0.4
    assert report["calibration"]["sequences"] == 3
    assert compressed["samples"] == {
        "source": str(text),
        "num_samples": 3,
        "seq_len": 32,
        "batch_size": 2,
        "seed": 0,
    }
    assert json.loads((out / "report.json").read_text()) == report

    evaluated = json.loads(main("evaluate", out, "--text", text, "--window", 64, "--json").out)
    assert evaluated["size"]["parameters"] == report["after"]["parameters"]
    assert evaluated["size"]["bytes"] == report["after"]["bytes"]
    assert 1 < evaluated["result"]["perplexity"] < 10_000

    inspected = json.loads(main("inspect", out, "--json").out)
    assert inspected["parameters"] == report["after"]["parameters"]
    assert inspected["dense_parameters"] == report["before"]["parameters"]
    assert inspected["compression_ratio"] == pytest.approx(report["compression_ratio"])
    ranks = {module["name"]: module["rank"] for module in inspected["modules"]}
    assert ranks == {module["name"]: module["rank"] for module in report["modules"] if not module["reason"]}


def test_tables_show_what_was_done(model: Path, text: Path, tmp_path: Path, main: RunMain) -> None:
    out = tmp_path / "small"
    options = ["--calibration", text, "--num-samples", 2, "--seq-len", 32, "--layers", "0-1", "--retain-ratio", 0.4]
    shown = main("compress", model, "-o", out, *options, "--preset", "paper")
    assert shown.code == 0
    assert "14 replaced, 0 left" in shown.out
    assert "40.0 % of the parameters of each matrix" in shown.out
    assert "layer 1 attention" in shown.err
    assert "perplexity" in main("evaluate", out, "--text", text, "--window", 64).out
    table = main("inspect", out).out
    assert "attention, low-rank" in table
    assert re.search(r"layer +q +k +v +o +gate +up +down +kept +BI", table)


def test_env_lists_every_backend_of_the_table(main: RunMain) -> None:
    from grasp_kernels.dispatch import BACKENDS, backend_missing

    facts = json.loads(main("env", "--json").out)
    assert facts["backends"] == {row.name: backend_missing(row.name) or "available" for row in BACKENDS}
    assert facts["versions"]["torch"] == torch.__version__
    shown = main("env").out
    for row in BACKENDS:
        assert row.name in shown


@pytest.mark.slow
def test_json_is_all_that_a_process_writes_to_stdout(model: Path, text: Path, tmp_path: Path) -> None:
    options = ["--calibration", text, "--num-samples", 2, "--seq-len", 32, "--num-layers", 1]
    run = command_line.grasp("compress", model, "-o", tmp_path / "out", *options, "--json", cwd=tmp_path)
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout)["output"] == str(tmp_path / "out")
    steps = [line.split("  ")[0] for line in run.stderr.splitlines()]
    assert steps[0] == "loading tiny"
    assert steps[-1] == "saving"
    assert all(re.fullmatch(r".+ +\d+\.\d s", line) for line in run.stderr.splitlines())


@pytest.mark.slow
def test_a_process_with_bad_input_writes_one_line(model: Path, tmp_path: Path) -> None:
    run = command_line.grasp("compress", "no/such-model", "-o", tmp_path / "out", cwd=tmp_path)
    assert_refused(Outcome(run.returncode, run.stdout, run.stderr), "no/such-model")
    assert len(run.stderr.splitlines()) == 1
    assert files(tmp_path) == set()


@pytest.mark.slow
def test_ctrl_c_ends_with_130_and_leaves_what_the_same_command_continues(model: Path, tmp_path: Path) -> None:
    text = tmp_path / "long.txt"
    text.write_text(TEXT * 100)
    options = ["-o", tmp_path / "new" / "out", "--calibration", text, "--num-samples", 500, "--seq-len", 32]
    process = subprocess.Popen(
        [sys.executable, "-m", "grasp", "compress", str(model), *map(str, options), "--num-layers", "3", "--json"],
        env=command_line.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # a shell that started the tests in its background would have them ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("prefix"):
            break
    time.sleep(0.2)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == ""
    kept = tmp_path / "new" / "out.partial"
    note, last = err.splitlines()[-2:]
    assert "again to resume" in note
    assert note.endswith(str(kept))
    assert last == "interrupted"
    assert "state.json" in files(kept)
    assert not (tmp_path / "new" / "out").exists()


RELOAD = """
from transformers import AutoModelForCausalLM
import sys
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
tokens = model.generate(**tokenizer("The capital of France is", return_tensors="pt"), max_new_tokens=8, do_sample=False)
print(repr(tokenizer.decode(tokens[0], skip_special_tokens=True)))
print(sum(type(module).__name__ == "LowRankLinear" for module in model.modules()))
print(sum(parameter.numel() for parameter in model.parameters()))
"""


@pytest.mark.slow
def test_a_real_model_is_compressed_evaluated_inspected_and_loaded_by_plain_transformers(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(
        "The city lies on both banks of the river, and was founded by fishermen in the ninth century. Its first bridge "
        "was built of wood; after the great fire of 1471 the council had it rebuilt in stone.\n" * 4
    )
    out = tmp_path / "small"

    def run(*arguments: object) -> dict:
        process = command_line.grasp(*arguments, "--json", cwd=tmp_path)
        assert process.returncode == 0, process.stderr
        return json.loads(process.stdout)

    options = ["--num-layers", 2, "--num-samples", 4, "--seq-len", 256]
    report = run("compress", "builtin", "-o", out, *options)["report"]
    assert report["config"]["basis"] == "kfac"  # the default is the best preset
    replaced = [module["name"] for module in report["modules"] if not module["reason"]]
    assert 7 < len(replaced) <= 14
    evaluated = run("evaluate", out, "--text", text, "--window", 128)
    assert evaluated["result"]["nonfinite"] == 0
    assert evaluated["result"]["perplexity"] < 100
    assert run("inspect", out)["parameters"] == report["after"]["parameters"]

    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    reload = subprocess.run(
        [sys.executable, "-c", RELOAD, str(out)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert reload.returncode == 0, reload.stderr
    generated, layers, parameters = reload.stdout.splitlines()
    assert generated.startswith("'The capital of France is")
    assert len(generated) > len("'The capital of France is'") + 5
    assert int(layers) == len(replaced)
    assert int(parameters) == report["after"]["parameters"]


def test_a_dry_run_says_what_it_would_take_and_reads_no_weights(main: RunMain, model: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((model / "config.json").read_bytes())
    asked = (
        "compress",
        bare,
        "-o",
        tmp_path / "out",
        "--layers",
        "0,2",
        "--num-samples",
        4,
        "--seq-len",
        64,
        "--dry-run",
        "--preset",
        "paper",
    )
    outcome = main(*asked)
    assert outcome.code == 0
    for words in ("layer 2 mlp", "layer 0 attention", "FLOPs", "about", "above the model's", "hidden states"):
        assert words in outcome.out
    outcome = main(*asked, "--batch-size", "auto", "--schedule", "single-sweep", "--json")
    document = json.loads(outcome.out)
    assert document["samples"]["batch_size"] == document["estimate"]["batch_size"] == 4
    assert [sweep["layers"] for sweep in document["estimate"]["sweeps"]] == [3]
    assert document["seconds"] > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bare"]


def test_a_dry_run_says_which_layers_are_a_guess(main: RunMain, model: Path, tmp_path: Path) -> None:
    outcome = main("compress", model, "-o", tmp_path / "out", "--num-layers", 1, "--seq-len", 64, "--dry-run")
    assert re.search(r"layers +1, assumed: block influence decides", outcome.out)
    assert "for other layers" in outcome.out
    outcome = main("compress", model, "-o", tmp_path / "out", "--seq-len", 64, "--dry-run")
    assert re.search(r"layers +0-2\s", outcome.out)
    assert "assumed" not in outcome.out


def test_the_batch_size_can_be_found(main: RunMain, model: Path, text: Path, tmp_path: Path) -> None:
    asked = ("compress", model, "-o", tmp_path / "out", "--layers", 2, "--num-samples", 4, "--seq-len", 32)
    outcome = main(*asked, "--calibration", text, "--batch-size", "auto", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out)["samples"]["batch_size"] == 4
    assert "batch size 4" in outcome.err


@pytest.mark.parametrize("value", ["0", "-1", "many", "1.5"])
def test_a_batch_size_that_is_none_is_refused(value: str, main: RunMain, model: Path, tmp_path: Path) -> None:
    outcome = main("compress", model, "-o", tmp_path / "out", "--batch-size", value)
    assert (outcome.code, outcome.err) == (2, f"error: batch size must be a positive number or auto; got {value!r}\n")
