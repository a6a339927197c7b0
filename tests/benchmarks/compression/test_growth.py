from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.compression import growth
from benchmarks.compression.growth import exponent, main
from benchmarks.compression.random_llama import MeasuredRun, RandomLlama
from tests.command_line import run_script


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_is_the_power_that_a_cost_grows_with(power: float) -> None:
    sizes = [2, 4, 8, 50]
    assert exponent(sizes, [3.0 * size**power for size in sizes]) == pytest.approx(power, abs=1e-12)


def test_each_series_changes_one_size_and_has_its_exponents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(llama: RandomLlama, folder: Path, *, memory: int | None, threads: int) -> MeasuredRun:
        tokens = llama.sequences * llama.seq_len
        return MeasuredRun(1000 * llama.layers, tokens, llama.layers * tokens**0.5, {}, {}, {})

    monkeypatch.setattr(growth, "measure", measure)
    output = tmp_path / "growth.jsonl"
    result = run_script(main, "--layers", "1,3", "--tokens", "1024,2048", "--memory", "9", "-o", output)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["grows"], line["llama"]["layers"], line["tokens"]) for line in lines] == [
        ("layers", 1, 1024),
        ("layers", 3, 1024),
        ("tokens", 1, 1024),
        ("tokens", 1, 2048),
    ]
    assert {line["memory"] for line in lines} == {9}
    exponents = [row.split()[-3:] for row in result.output.replace("│", " ").splitlines() if "exponent" in row]
    assert exponents == [["1.00", "1.00", "0.00"], ["0.50", "0.00", "1.00"]]
