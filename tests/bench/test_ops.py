from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner, Result

from grasp.bench import conditions, timing
from grasp.bench import ops as bench_ops
from grasp.bench.ops import Case, floor_seconds, main
from grasp.bench.workloads import OPS
from grasp_kernels import roofline
from grasp_kernels.dispatch import backend_missing
from grasp_kernels.shapes import parse_shape

SHAPE = ("--shape", "48x32r5", "--rows", "3", "--dtype", "float32", "--device", "cpu", "--repetitions", "2")


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure as little as makes a time."""
    monkeypatch.setattr(timing, "WARM_UP", 1e-4)
    monkeypatch.setattr(timing, "CPU_BATCH", 1e-4)
    monkeypatch.setattr(conditions, "READ_BYTES", 1 << 16)
    monkeypatch.setattr(conditions, "MATMUL_SIZE", {"cpu": 16, "cuda": 16})
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def run(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(main)
    return CliRunner().invoke(app, [*SHAPE, "--rotate-mb", "0", *arguments])


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_op_is_timed_beside_its_baselines_and_its_floor(tmp_path: Path) -> None:
    result = run("--backend", "reference", "--threads", "1", "-o", str(tmp_path / "ops.jsonl"))
    assert result.exit_code == 0, result.output
    written = lines(tmp_path / "ops.jsonl")
    assert [(line["op"], line["provider"]) for line in written] == [
        (op, provider) for op in OPS for provider in ("reference", "unfused", "dense")
    ]
    for line in written:
        assert line["median_us"] > 0  # type: ignore[operator]
        assert line["speedup_over_unfused" if line["provider"] == "unfused" else "speedup_over_dense"]
        assert line["conditions"]["threads"] == 1  # type: ignore[index]
        assert line["conditions"]["torch"] == torch.__version__  # type: ignore[index]
    assert {line["provider"] for line in written if line["floor_us"] is None} == {"dense"}
    for op in OPS:
        assert op in result.output


def test_results_are_added_to_a_file(tmp_path: Path) -> None:
    for _ in range(2):
        run("--op", "lowrank_linear", "--backend", "reference", "-o", str(tmp_path / "ops.jsonl"))
    assert len(lines(tmp_path / "ops.jsonl")) == 6


def test_a_wrong_backend_is_not_timed_and_fails_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench_ops, "wrong", lambda op, problem, run: "off by one")
    result = run("--op", "lowrank_linear", "--backend", "reference", "-o", str(tmp_path / "ops.jsonl"))
    assert result.exit_code == 1
    assert "WRONG: reference lowrank_linear at 48x32r5, M = 3, float32: off by one" in " ".join(result.output.split())
    first, *others = lines(tmp_path / "ops.jsonl")
    assert (first["provider"], first["wrong"]) == ("reference", True)
    assert {line["provider"] for line in others} == {"unfused", "dense"}


def test_what_is_not_measured_is_said(tmp_path: Path) -> None:
    result = run("--op", "lowrank_linear", "--shape", "48x32r5+48x16r3", "--backend", "reference")
    assert result.exit_code == 0
    assert "Not measured: * lowrank_linear at 48x32r5+48x16r3, M = 3, float32: the op takes" in " ".join(
        result.output.split()
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--op", "matmul"), "unknown op 'matmul'; expected one of lowrank_linear"),
        (("--dtype", "int8"), "unknown dtype 'int8'; expected one of float32"),
        (("--backend", "warp"), "unknown backend 'warp'; expected one of"),
        (("--shape", "48"), "shape '48' is not KxNrR"),
        (("--device", "tpu"), "unknown device 'tpu'; expected cpu or cuda"),
    ],
)
def test_bad_arguments_are_one_clear_message(arguments: tuple[str, str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())


def test_floors_are_of_what_a_provider_reads() -> None:
    card = roofline.measured("a card", flops=1e30, bandwidth=1e9)
    case = Case("lowrank_linear", parse_shape("4096x4096r204"), 1, torch.float32)
    low_rank, dense = (floor_seconds(case, name, card) for name in ("reference", "dense"))
    assert low_rank == pytest.approx((204 * 8192 + 8192) * 4 / 1e9)
    assert dense == pytest.approx((4096 * 4096 + 8192) * 4 / 1e9)
    assert floor_seconds(case._replace(op="singular_value_grad"), "dense", card) is None


def test_conditions_know_the_commit_of_a_checkout() -> None:
    device = torch.device("cpu")
    now = conditions.conditions(roofline.measured("a card", flops=1, bandwidth=1), device)
    assert (now.commit is None) == (now.dirty is None)
    if now.commit is not None:
        assert len(now.commit) == 40
    assert conditions.device_name(device)
    assert now.instruction_sets is not None
    assert ("portable" in now.instruction_sets) == (backend_missing("cpu") is None)
