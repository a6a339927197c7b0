from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import Result

from benchmarks.compression import statistics_cost
from benchmarks.compression.statistics_cost import difference, main, random_factors
from grasp.model.targets import layer_targets
from grasp.statistics import covariance
from grasp.statistics.covariance import covariance_bytes
from grasp_kernels.products import accumulate_gram_
from tests.command_line import run_script
from tests.tiny_models import tiny_model


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model."""
    monkeypatch.setattr(statistics_cost, "load_model", lambda name, dtype: (tiny_model("llama"), None))


def run(*arguments: str) -> Result:
    sizes = ("--sequences", "3", "--seq-len", "8", "--batch-size", "2", "--repeats", "2", "--threads", "1")
    return run_script(main, "tiny", *sizes, *arguments)


@pytest.mark.parametrize(("options", "dtype"), [((), "float32"), (("--sweep-dtype", "bfloat16"), "bfloat16")])
def test_every_statistic_is_timed_against_a_bare_sweep(tmp_path: Path, options: tuple[str, ...], dtype: str) -> None:
    output = tmp_path / "statistics.jsonl"
    result = run("--layers", "0,2", *options, "-o", str(output))
    assert result.exit_code == 0, result.output
    lines = {line["provider"]: line for line in map(json.loads, output.read_text().splitlines())}
    assert list(lines) == ["bare sweep", "covariances", "moments"]
    for line in lines.values():
        assert line["layers"] == [0, 2]
        assert line["dtype"] == dtype
        assert line["seconds_per_sequence"] > 0
        assert line["conditions"]["threads"] == 1
    assert lines["bare sweep"]["added"] == lines["bare sweep"]["statistics_bytes"] == 0
    model = tiny_model("llama")
    targets = [target for layer in (0, 2) for target in layer_targets(model, layer)[0]]
    assert lines["covariances"]["statistics_bytes"] == covariance_bytes(targets)


def test_statistics_of_a_short_batch_agree_with_fp64() -> None:
    model = tiny_model("gpt2")
    factors = {target: random_factors(target) for target in layer_targets(model, 1)[0]}
    assert 0 < difference(model, factors, None) < 1e-5


def test_wrong_statistics_are_not_timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(covariance, "accumulate_gram_", lambda gram, x: accumulate_gram_(gram, x).mul_(1.01))
    result = run("-o", str(tmp_path / "statistics.jsonl"), "--num-layers", "1")
    assert result.exit_code == 1
    assert "nothing was timed" in " ".join(result.output.split())
    assert not (tmp_path / "statistics.jsonl").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--num-layers", "4"), "the model has 3 decoder layers, got num_layers=4"),
        (("--layers", "1", "--sweep-dtype", "float8"), "sweep_dtype must be bfloat16, float32 or None, got 'float8'"),
    ],
)
def test_bad_arguments_are_one_clear_message(arguments: tuple[str, ...], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
