from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from typer.testing import Result

from benchmarks.compression import decompositions
from benchmarks.compression.decompositions import difference, main
from grasp.method.svd import SVD, decomposition_flops
from tests.command_line import run_script


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decompositions, "MATMUL_SIZE", 64)


def run(*arguments: str) -> Result:
    return run_script(main, *arguments, "--threads", "1")


def test_shapes_are_timed_and_larger_ones_are_extrapolated_from_the_largest_of_their_form(tmp_path: Path) -> None:
    output = tmp_path / "svd.jsonl"
    result = run("48x40,96x80,80x96", "--extrapolated", "480x400", "--repeats", "2", "-o", str(output))
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["shape"] for line in lines] == [[48, 40]] * 2 + [[96, 80]] * 2 + [[80, 96]] * 2 + [[480, 400]] * 2
    assert all(line["seconds"] > 0 and line["conditions"]["threads"] == 1 for line in lines)
    measured, extrapolated = lines[2], next(line for line in lines[6:] if line["operation"] == "decomposition")
    assert measured["flops"] == decomposition_flops((96, 80), inputs=True, outputs=True, rank=measured["rank"])
    assert measured["repeats"] == 2
    assert extrapolated["extrapolated_from"] == [96, 80]
    assert extrapolated["repeats"] == 0
    assert extrapolated["peak_bytes"] is None
    rates = [line["flops"] / line["seconds"] for line in (measured, extrapolated)]
    assert rates[0] == pytest.approx(rates[1])
    assert result.output.count("extrapolated") == 2


def test_losses_of_small_shapes_agree_with_fp64() -> None:
    assert 0 < difference(torch.device("cpu")) < 1e-5


@pytest.mark.parametrize("factor", [1.0, float("nan")])
def test_a_wrong_decomposition_is_not_timed(factor: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = decompositions.decompose_in

    def spoiled(*arguments: torch.Tensor, rank: int | None = None) -> SVD:
        U, S, Vh = right(*arguments, rank=rank)
        return SVD(factor * U.roll(1, dims=1), S, Vh)

    monkeypatch.setattr(decompositions, "decompose_in", spoiled)
    result = run("64x48", "-o", str(tmp_path / "svd.jsonl"))
    assert result.exit_code == 1
    assert "nothing was timed" in " ".join(result.output.split())
    assert not (tmp_path / "svd.jsonl").exists()


@pytest.mark.parametrize("shapes", ["64", "64x1", "64x48x3", "axb"])
def test_bad_shapes_are_one_clear_message(shapes: str) -> None:
    result = run(shapes)
    assert result.exit_code == 2
    assert "expected shapes of two numbers above 1 such as 4096x14336,512x512" in " ".join(
        result.output.replace("│", " ").split()
    )
