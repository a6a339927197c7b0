from __future__ import annotations

from dataclasses import replace
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command

from grasp.checkpoint.compression_report import CompressionReport
from grasp.cli.arguments import parse_bytes, parse_layers
from grasp.cli.root import app
from grasp.compress import compress_
from grasp.config import PRESETS, GraspConfig
from grasp.reporting.rerun_command import by_option, later_form, rerun_command
from grasp.statistics.processes import Processes
from grasp.workflows.compress import compress, with_request
from grasp.workflows.samples import Samples
from tests import many_processes
from tests.command_line import grasp, save_tiny_model
from tests.tiny_models import tiny_batches, tiny_model

TEXT = "The quick brown fox jumps over the lazy dog, and then it does so once more. " * 20


def compress_first(processes: Processes, folder: Path, config: GraspConfig, samples: Samples) -> None:
    options = {"dtype": "float32", "device": None if processes.size == 1 else "cpu"}
    compress(str(folder / "tiny model"), folder / "first", config, samples, **options, processes=processes)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "processes"),
    [
        (GraspConfig.paper(layers=(0, 2), retain_ratio=0.35, metric="gradient"), 1),
        (GraspConfig.best(compression_ratio=0.1), 2),
    ],
)
def test_the_command_makes_the_same_again(config: GraspConfig, processes: int, tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "tiny model")
    (tmp_path / "text.txt").write_text(TEXT)
    samples = Samples(str(tmp_path / "text.txt"), 4, 24, 2, seed=3)
    for outcome in many_processes.run(compress_first, tmp_path, config, samples, size=processes):
        assert outcome.error is None, outcome.error
    first = CompressionReport.load(tmp_path / "first")
    words = rerun_command(first, "again")
    assert words is not None
    assert (words[0] == "torchrun") == (processes == 2)
    arguments = words[words.index("compress") :]
    run = grasp(*arguments, cwd=tmp_path, processes=processes)
    assert run.returncode == 0, run.stderr
    again = CompressionReport.load(tmp_path / "again")
    assert again.request == first.request
    assert again.calibration == first.calibration
    assert again.config == first.config
    assert again.modules == first.modules


def test_paths_on_this_machine_are_not_told(tmp_path: Path) -> None:
    report = with_request(
        *(a_report(), str(tmp_path / "models" / "mine"), Samples(str(tmp_path / "corpus.txt"))),
        costs=str(tmp_path / "costs.json"),
    )
    words = rerun_command(report, "out")
    assert words is not None
    assert words[:5] == ["grasp", "compress", "mine", "-o", "out"]
    assert words[words.index("--calibration") + 1] == "corpus.txt"
    assert words[words.index("--costs") + 1] == "costs.json"
    assert str(tmp_path) not in report.to_json()


def test_names_on_the_hub_are_told_whole() -> None:
    report = with_request(a_report(), "meta-llama/Llama-3.1-8B", Samples("wikitext2"))
    words = rerun_command(report, "out")
    assert words is not None
    assert words[2] == "meta-llama/Llama-3.1-8B"


@pytest.mark.parametrize(
    "config",
    [
        GraspConfig(),
        GraspConfig.paper(num_layers=2, threshold_ratio=0.5, metric="gradient", schedule="per-layer"),
        GraspConfig.best(),
        GraspConfig.best(target_bytes=10**6, schedule="single-sweep", refit=False, sweep_dtype="bfloat16"),
        GraspConfig.best(layers=(1,), retain_ratio=0.3),
    ],
)
def test_the_options_of_the_command_make_the_configuration(config: GraspConfig) -> None:
    of_earlier_versions = {"redundancy": "block_influence", "remove_layers": True}
    settings = {**config.to_dict(), **of_earlier_versions}
    report = with_request(replace(a_report(), config=settings), "m", Samples(), device="cpu")
    words = rerun_command(replace(report, request={**report.request, "shard": True}), "out")
    assert words is not None
    group: Any = get_command(app)
    command = group.commands["compress"]
    arguments = command.make_context("compress", words[words.index("compress") + 1 :]).params
    assert arguments["shard"]
    names = signature(PRESETS[arguments["preset"]]).parameters
    options = {name: arguments[name] for name in names if arguments[name] is not None}
    if "layers" in options:
        options["layers"] = parse_layers(options["layers"])
    if "target_bytes" in options:
        options["target_bytes"] = parse_bytes(options["target_bytes"])
    assert PRESETS[arguments["preset"]](**options) == config


def test_a_configuration_that_no_preset_makes_has_no_command() -> None:
    for config in (GraspConfig(basis="whitened").to_dict(), {**GraspConfig().to_dict(), "scope": "auto"}):
        assert rerun_command(with_request(replace(a_report(), config=config), "m", Samples()), "out") is None


def test_each_option_has_a_line_with_its_value() -> None:
    words = ["torchrun", "--nproc-per-node", "2", "-m", "grasp", "compress", "m", "-o", "o", "--refit", "--seed", "0"]
    assert by_option(words) == [words[:9], ["--refit"], ["--seed", "0"]]


def test_a_report_from_python_has_no_command() -> None:
    assert rerun_command(a_report(), "out") is None


def a_report() -> CompressionReport:
    return compress_(tiny_model("llama"), tiny_batches(1), GraspConfig(num_layers=1))


@pytest.mark.parametrize(("compressed_as", "form"), [("factored", "pivoted"), ("pivoted", "factored")])
def test_a_form_that_is_not_the_configured_one_is_that_of_a_conversion(compressed_as: str, form: str) -> None:
    report = a_report()
    report = replace(report, config={**report.config, "form": compressed_as})
    for stored, expected in ((compressed_as, None), (form, form)):
        modules = tuple(replace(module, form=stored) for module in report.modules)
        assert later_form(replace(report, modules=modules)) == expected
