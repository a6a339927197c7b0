from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from grasp.bench import costs as bench_costs
from speedgate import timing
from tests.command_line import RunMain

SINGLE = ("--schedule", "single-sweep")
FEW = ("--num-samples", 2, "--seq-len", 32)


@pytest.mark.parametrize("bits", [(), ("--bits", "8")])
def test_costs_are_measured_and_a_latency_is_met_by_them(
    main: RunMain, model: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bits: tuple[str, ...]
) -> None:
    monkeypatch.setattr(timing, "WARM_UP", 0.001)
    monkeypatch.setattr(bench_costs, "ROTATE_BYTES", 1 << 16)
    costs, out = tmp_path / "costs.json", tmp_path / "out"
    measured = main("bench", "costs", model, "-o", costs, *bits)
    assert measured.code == 0, measured.err
    assert "64 x 32" not in measured.out
    assert "48 x 32" in measured.out
    table = json.loads(costs.read_text())
    for linear in table["linears"]:  # on a model this small everything is overhead: pretend that it is not
        size, unit = linear["out_features"] + linear["in_features"], 0.9e-6 if linear["storage"] else 1e-6
        linear["dense"] = unit * linear["out_features"] * linear["in_features"]
        linear["seconds"] = [unit * size * rank for rank in linear["ranks"]]
    costs.write_text(json.dumps({**table, "layer": 0.0, "rest": 0.0, "layer_quantized": 0.0, "rest_quantized": 0.0}))
    options = ("--target-latency", 0.7, "--costs", costs, "--calibration", text, *bits, *FEW, *SINGLE)
    done = main("compress", model, "-o", out, *options)
    assert done.code == 0, done.err
    assert re.search(r"ms per token, [67]\d\.\d %, as predicted for", re.sub(r"\s+", " ", done.out))
    report = json.loads((out / "report.json").read_text())
    assert report["decode_seconds"]["after"] <= 0.7 * report["decode_seconds"]["dense"]
    assert report["config"]["target_latency"] == 0.7


def test_bytes_are_a_target_with_a_unit(main: RunMain, model: Path, text: Path, tmp_path: Path) -> None:
    size = (model / "model.safetensors").stat().st_size
    target = f"{0.9 * size / 1e3:.1f}kB"
    options = ("--target-bytes", target, "--preset", "paper", "--calibration", text)
    done = main("compress", model, "-o", tmp_path / "out", *options, *FEW)
    assert done.code == 0, done.err
    after = json.loads((tmp_path / "out" / "report.json").read_text())["after"]["bytes"]
    assert after == pytest.approx(0.9 * size, rel=0.03)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-bytes", "many"), "bytes must be a number such as 200MB"),
        (("--target-latency", 0.5, "--preset", "paper"), "--target-latency is an option of --preset best"),
        (
            ("--target-latency", 0.5, *SINGLE, "--costs", "H9000"),
            "--costs must be a file that grasp bench costs wrote, or a",
        ),
        (("--costs", "H100"), "--costs H100 needs --target-latency"),
        (("--target-latency", 0.5, "--num-layers", 1, *SINGLE), "--num-layers and --target-latency exclude each other"),
        (("--target-bytes", "1kB"), "--target-bytes 1000 cannot be reached: rank 1 in every eligible matrix gives"),
    ],
)
def test_targets_that_make_no_sense_are_refused(
    main: RunMain, model: Path, text: Path, tmp_path: Path, arguments: tuple[object, ...], message: str
) -> None:
    outcome = main("compress", model, "-o", tmp_path / "out", "--calibration", text, *FEW, *arguments)
    assert outcome.code == 2
    assert message in " ".join(outcome.err.split())
    assert not (tmp_path / "out").exists()
