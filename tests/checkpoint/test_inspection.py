from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from grasp.checkpoint.inspection import inspect_checkpoint
from grasp.compress import compress_
from grasp.config import GraspConfig
from grasp.errors import CheckpointError
from tests.checkpoint_edits import edit_config, edit_json, edit_tensors
from tests.tiny_models import IMAGE_TEXT, tiny_batches, tiny_model

FAMILIES = ["llama", "gpt2", "gemma3", "phi3", "opt", IMAGE_TEXT]
Q = "model.layers.2.self_attn.q_proj"


def compressed(folder: Path, family: str = "llama", dtype: torch.dtype = torch.float32) -> Any:
    model = tiny_model(family, dtype)
    report = compress_(model, tiny_batches(1), GraspConfig(layers=(2,), retain_ratio=0.4))
    model.save_pretrained(folder)
    return report


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_and_ranks_are_those_of_the_report(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    report = compressed(tmp_path, family, dtype)
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.parameters == report.after.parameters
    assert inspection.bytes == report.after.bytes
    assert inspection.dense_parameters == report.before.parameters
    assert inspection.num_layers == 3
    assert {m.name: (m.layer, m.rank, m.parameters, m.bytes) for m in inspection.modules} == {
        m.name: (m.layer, m.rank, m.parameters_after, m.bytes_after) for m in report.compressed
    }
    assert sum(part.bytes for part in inspection.parts) == inspection.bytes
    parts = {part.name: part for part in inspection.parts}
    assert {"embeddings", "attention, dense", "attention, low-rank", "mlp, dense", "mlp, low-rank", "norms"} <= set(
        parts
    )
    low_rank = parts["attention, low-rank"].parameters + parts["mlp, low-rank"].parameters
    assert low_rank == sum(m.parameters_after for m in report.compressed)
    assert ("head and other" in parts) == (family != "gemma3")
    assert inspection.report is None


def test_a_dense_folder_has_no_low_rank_parts(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path)
    inspection = inspect_checkpoint(tmp_path)
    assert inspection.modules == ()
    assert inspection.compression_ratio == 0
    assert not any("low-rank" in part.name for part in inspection.parts)


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert inspect_checkpoint(tmp_path).parameters == sum(parameter.numel() for parameter in model.parameters())


def raise_rank(folder: Path) -> None:
    edit_config(folder, lambda config: config["ranks"].update({Q: config["ranks"][Q] + 1}))


def drop_factor(folder: Path) -> None:
    edit_tensors(folder, lambda tensors: tensors.pop(f"{Q}.Vh"))


def edit_factors(folder: Path, edit: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Change both factors of one linear."""
    U, Vh = f"{Q}.U", f"{Q}.Vh"
    edit_tensors(
        folder, lambda tensors: tensors.update({U: edit(tensors[U]), Vh: edit(tensors[Vh].mT).mT.contiguous()})
    )


def whole_numbers(folder: Path) -> None:
    edit_factors(folder, lambda factor: factor.to(torch.int8))


def rank_above_the_shape(folder: Path) -> None:
    edit_factors(folder, lambda factor: torch.zeros(len(factor), 33))
    edit_config(folder, lambda config: config["ranks"].update({Q: 33}))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


def drop_tensors(folder: Path) -> None:
    set_config(quantization_config=None)(folder)
    edit_tensors(folder, dict.clear)


def set_config(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "config.json", lambda config: config.update(values))


def set_ranks(ranks: object) -> Callable[[Path], object]:
    return set_config(quantization_config={"quant_method": "grasp", "format_version": 1, "ranks": ranks})


def set_report(**values: object) -> Callable[[Path], object]:
    return lambda folder: edit_json(folder / "report.json", lambda report: report.update(values))


def set_module(**values: object) -> Callable[[Path], object]:
    values = {**values, "reason": ""}
    return lambda folder: edit_json(folder / "report.json", lambda report: report["modules"][0].update(values))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (raise_rank, r"\.U has the shape \(.*\), config\.json requires \("),
        (drop_factor, r"q_proj.U or .*q_proj.Vh is missing"),
        (cut, "model.safetensors cannot be read .* expected a complete safetensors file"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (lambda folder: (folder / "config.json").write_text("[]"), r"config\.json is a JSON list"),
        (lambda folder: (folder / "config.json").unlink(), r"no file .*config\.json"),
        (lambda folder: (folder / "model.safetensors").unlink(), "has no .safetensors file"),
        (lambda folder: (folder / "report.json").write_text("{}"), r"report\.json: not a compression report"),
        (lambda folder: (folder / "report.json").write_bytes(b"\xff{"), r"report\.json is not UTF-8"),
        (set_config(quantization_config="grasp"), r"config\.json: quantization_config must be a JSON object, got 'gra"),
        (set_config(quantization_config=[1]), r"config\.json: quantization_config must be a JSON object, got \[1\]"),
        (set_config(quantization_config={"quant_method": "gptq"}), r"config\.json: the model is quantised \(gptq\)"),
        (set_ranks(None), r"config\.json: ranks must map module names .*got None"),
        (set_ranks(["a"]), r"config\.json: ranks must map .*got \['a'\]"),
        (set_config(quantization_config={"format_version": 4, "shapes": None}), r"json: shapes must map .*got None"),
        (set_ranks({"a": "1"}), r"config\.json: rank of a must be a positive integer, got '1'"),
        (set_ranks({"a": 0}), r"config\.json: rank of a must be a positive integer, got 0"),
        (set_ranks({"a\x1b[2J": 1}), r"config\.json: ranks name 'a\\x1b\[2J', which is no path"),
        (set_config(quantization_config={"quant_method": "grasp", "format_version": 5}), "format_version 5"),
        (whole_numbers, r"\.U has the dtype I8; expected one of F64"),
        (rank_above_the_shape, r"rank 33 of .* is above 32"),
        (set_report(decode_seconds=[1]), r"report\.json: .*decode_seconds must be an object"),
        (set_report(seconds={"a": "b"}), r"report\.json: .*must be numbers, got 'b'"),
        (set_report(scope=3), r"report\.json: .*must be texts, got \[3"),
        (set_module(importance_kept=[0.5]), r"report\.json: .*must be numbers, got \[0\.5\]"),
        (set_module(rank=10**9), r"report\.json: .*rank of .* must be an integer from 0 to 32, got 1000000000"),
        (set_report(request={"model": 5}), r"report\.json: .*must be texts, got .*, 5, "),
        (
            set_report(block_influence=[0.1] * 4, removed_layers=[0, 1, 3]),
            r"report\.json is of .* which 1 layers remain",
        ),
        (drop_tensors, "has no tensors"),
        (set_report(block_influence=[]), r"report\.json: .*block_influence has 0 layers"),
        (set_report(block_influence="abc"), r"report\.json: .*block_influence must be numbers"),
        (set_report(after={"parameters": "x", "bytes": 1, "decoder_parameters": 1}), r"report\.json: .*got 'x'"),
        (set_report(before={"parameters": 0, "bytes": 0, "decoder_parameters": 0}), r"report\.json: .*no parameters"),
    ],
)
def test_a_damaged_folder_is_refused_with_the_damage(
    damage: Callable[[Path], object], words: str, tmp_path: Path
) -> None:
    report = compressed(tmp_path)
    (tmp_path / "report.json").write_text(report.to_json())
    assert inspect_checkpoint(tmp_path).report == report
    damage(tmp_path)
    with pytest.raises(CheckpointError, match=words):
        inspect_checkpoint(tmp_path)
